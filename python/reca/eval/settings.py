"""Settings of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reca.eval.suites import Item, Suite, open_suite
from reca.eval.suites.base import check_items
from reca.io.paths import is_dir
from reca.models.common.inference import check_pairs
from reca.options.names import hint, option

STEPS = ("generate", "judge", "score", "report")


@dataclass
class Settings:
    """Settings shared by both sides of an evaluation. See `reca.evaluate`."""

    suite: Suite
    steps: Sequence[str] = STEPS
    judge: str | None = None
    judge_options: Mapping[str, Any] = field(default_factory=dict)
    images_per_item: int | None = None
    limit: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    partial: bool = False

    def __post_init__(self) -> None:
        if unknown := [step for step in self.steps if step not in STEPS]:
            near = hint(unknown[0], STEPS)
            raise ValueError(f"steps {', '.join(map(repr, unknown))}: unknown; the steps are {', '.join(STEPS)}{near}")
        for name in ("images_per_item", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{option(name)} must be at least 1, got {value}")
        check_pairs(seeds=[self.seed])

    @property
    def count(self) -> int:
        return self.images_per_item or self.suite.images_per_item

    def items(self, images: Path | None = None) -> list[Item]:
        """List the items, or `limit` evenly spaced groups of them.

        Without `--data`, items are read from the files next to the images if the suite's layout has them.
        """
        suite, found = self.suite, []
        if images is not None and is_dir(images) and suite.data is None and suite.data_help is not None:
            found = suite.items_of_images(images, self.partial)
        found = found or suite.items()
        check_items(suite, found)
        groups: dict[str, list[Item]] = {}
        for item in found:
            groups.setdefault(suite.group(item), []).append(item)
        if self.limit is None or self.limit >= len(groups):
            return found
        kept = list(groups.values())
        return [item for i in range(self.limit) for item in kept[i * len(kept) // self.limit]]


def open_settings(suite: str, data: str | Path | None, **others: Any) -> Settings:
    """Return Settings for a suite by name. data: the user's files of the benchmark. others: fields of Settings."""
    return Settings(open_suite(suite, None if data is None else Path(data)), **others)
