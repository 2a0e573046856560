"""The toy datasets: prompts about coloured shapes or emoji, with their own judges. They need no files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reca.eval.suites.base import Item, Key, RowFolders, Score, Value, answered, equal_weights, mean, tag_means
from reca.toy_datasets.dataset import JudgedPrompt, load_dataset

DEFAULT = "shapes"  # the dataset of the suite without options


class Toy(RowFolders):
    name = "toy"
    judge_kind = "toy"

    def __init__(self, data: Path | None = None, dataset: str = DEFAULT, seed: int = 0):
        """Select a toy dataset. dataset: its name. seed: determines the pairs that are held out of its captions."""
        super().__init__(data)
        self.dataset, self.seed = load_dataset(dataset), seed
        self.protocol = self.dataset.title

    @property
    def folder(self) -> str:
        """Return toy, toy_emoji, toy_emoji_seed1, ...: a folder has images of one dataset and seed."""
        dataset = "" if self.dataset.name == DEFAULT else f"_{self.dataset.name}"
        return f"{self.name}{dataset}" + (f"_seed{self.seed}" if self.seed else "")

    def items(self) -> list[Item]:
        return [
            Item(f"{number:05d}", p.category, p.text, metadata={"pairs": p.pairs, "prompt": p})
            for number, p in enumerate(self.dataset.prompts(self.seed))
        ]

    def sampling(self, umm: str) -> dict[str, Any]:
        """Return the demo's sampling options for a model, which its tiny recipe needs."""
        from reca.demo.pretrain import demo_setup

        return dict(demo_setup(umm, self.dataset).sampling) if umm in self.dataset.umms else {}

    def companions(self, item: Item) -> dict[str, str | Path]:
        return {f"{item.id}/metadata.jsonl": json.dumps({"tag": item.tag, "prompt": item.prompt})}

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        return judge.shows(image, JudgedPrompt(self.dataset, item.metadata["prompt"]))

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values: list[Value] = []
        pairs: dict[str, list[float]] = {}
        for item, key, answer in answered(answers, items):
            hit = float(answer["correct"])
            values.append(Value(*key, item.tag, hit, answer.get("seen", "")))
            if item.tag in ("colour", "attribution"):
                pairs.setdefault(item.metadata["pairs"], []).append(hit)
        tags = tag_means(values)
        metrics = {"overall": mean(list(tags.values()))} if tags else {}
        metrics |= {name: mean(hits) for name, hits in pairs.items()}
        return Score(values, equal_weights(tags), metrics, [])
