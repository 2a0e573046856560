"""The embedded toy world: 420 prompts about coloured shapes, judged by its own detector. It needs no files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reca.eval.suites.base import Item, Key, Score, Suite, Value, mean, tag_means


class World(Suite):
    """Pictures lie as in GenEval: <row>/samples/<k>.png."""

    name = "world"
    protocol = "toy world"
    judge_kind = "world"

    def __init__(self, data: Path | None = None, seed: int = 0):
        """seed: of the world, which pairs of colour and shape captions never show."""
        super().__init__(data)
        self.seed = seed

    def items(self) -> list[Item]:
        from reca.demo.measure import prompts

        return [
            Item(f"{number:05d}", p.category, p.text, metadata={"pairs": p.pairs, "prompt": p})
            for number, p in enumerate(prompts(self.seed))
        ]

    def sampling(self, umm: str) -> dict[str, Any]:
        """Return the demo's sampling options of a model, which its tiny recipe needs."""
        from reca.demo.pretrain import DEMO_UMMS, demo_setup

        return dict(demo_setup(umm).sampling) if umm in DEMO_UMMS else {}

    def path(self, item: Item, k: int) -> str:
        return f"{item.id}/samples/{k:04d}.png"

    def companions(self, item: Item) -> dict[str, str | Path]:
        return {f"{item.id}/metadata.jsonl": json.dumps({"tag": item.tag, "prompt": item.prompt})}

    def ask(self, judge: Any, item: Item, picture: Path) -> Any:
        return judge.shows(picture, item.metadata["prompt"])

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values: list[Value] = []
        pairs: dict[str, list[float]] = {}
        for item in items:
            for key in sorted(key for key in answers if key[0] == item.id):
                hit = float(answers[key]["correct"])
                values.append(Value(*key, item.tag, hit, answers[key].get("seen", "")))
                if item.tag in ("colour", "attribution"):
                    pairs.setdefault(item.metadata["pairs"], []).append(hit)
        tags = tag_means(values)
        metrics = {"overall": mean(list(tags.values()))} if tags else {}
        metrics |= {name: mean(hits) for name, hits in pairs.items()}
        return Score(values, {tag: 1 / len(tags) for tag in tags} or None, metrics, [])
