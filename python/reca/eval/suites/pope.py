"""POPE: whether an image contains an object, answered by the evaluated model (RUCAIBox/POPE, rule of LLaVA)."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import Item, Key, Score, Suite, Value, answered, equal_weights
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file

CATEGORIES = ("random", "popular", "adversarial")


def read_answer(reply: str) -> str:
    """Parse a reply: no if the first sentence has the word no, No or not, otherwise yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def measures(rows: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    """Compute accuracy, precision, recall, F1 and the fraction of yes from (answer, truth). Yes is positive."""
    both = sum(answer == truth == "yes" for answer, truth in rows)
    said, true = (sum(row[i] == "yes" for row in rows) for i in (0, 1))
    precision, recall = (both / count if count else None for count in (said, true))
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else 0.0
    accuracy = sum(answer == truth for answer, truth in rows) / len(rows)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes": said / len(rows)}


class Pope(Suite):
    """A suite of answers. Item ids are CATEGORY/QUESTION."""

    name = "pope"
    protocol = "POPE, rule of LLaVA"
    ability = "answer"
    judge_kind = "rule"
    data_help = (
        "Use a folder with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of "
        "github.com/RUCAIBox/POPE (output/coco), which `reca get suite pope` downloads, and a subfolder val2014 with "
        "their COCO val2014 images."
    )

    def items(self) -> list[Item]:
        root = self.data_path()
        items: list[Item] = []
        for category in CATEGORIES:
            for path in sorted(root.glob(f"*{category}.json")):
                items += self.read_lines(path, functools.partial(self._item, root, category))
        if not items:
            raise EvaluationError(f"{root} contains no questions of POPE. {self.data_help}")
        return items

    def _item(self, root: Path, category: str, row: Any) -> Item:
        source = next((p for f in ("val2014", ".") if is_file(p := root / f / row["image"])), None)
        meta = {"truth": row["label"].strip().lower()}
        source = source or root / "val2014" / row["image"]
        return Item(f"{category}/{row['question_id']}", category, row["text"], source, meta)

    def path(self, item: Item, k: int) -> str:
        return "answers.jsonl"

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values = []
        groups: dict[str, list[tuple[str, str]]] = {}
        for item, key, given in answered(answers, items):
            reply, truth = str(given), item.metadata["truth"]
            answer = read_answer(reply)
            groups.setdefault(item.tag, []).append((answer, truth))
            values.append(Value(*key, item.tag, float(answer == truth), "" if answer == truth else reply[:200]))
        metrics: dict[str, Any] = {tag: measures(rows) for tag, rows in groups.items()}
        if len(groups) == len(CATEGORIES):
            metrics["mean_f1"] = sum(figures["f1"] for figures in metrics.values()) / len(groups)
        return Score(values, equal_weights(groups), metrics, [])

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read a file per category, with the category in its name and answers in the order of the questions.

        Lines have the keys question and answer (POPE's script) or prompt and text (LLaVA's). They are matched to
        questions by order. Raises EvaluationError for an answer to another question and for two files of a category.
        """
        wanted, found = {item.id for item in items}, dict[Key, Any]()
        given, everything = sorted(path.glob("*.json*")) if is_dir(path) else [path], self.items()
        for category in CATEGORIES:
            questions = [item for item in everything if item.tag == category]
            named = [file for file in given if category in file.name]
            if len(named) > 1:
                names = ", ".join(file.name for file in named)
                raise EvaluationError(f"{path} contains {names}; keep only the one to be read")
            for number, line in enumerate(files.read_lines(named[0], errors="replace") if named else ()):
                try:
                    row = parse_json(line)
                    asked, reply = (row["question"], row["answer"]) if "answer" in row else (row["prompt"], row["text"])
                except (ValueError, KeyError, TypeError):
                    continue  # for example, a truncated line
                if number >= len(questions) or not str(asked).startswith(questions[number].prompt):
                    raise EvaluationError(
                        f"{named[0]}, line {number + 1}, answers {str(asked)[:80]!r}, which is not question "
                        f"{number + 1} of {category}; expected the answers in the order of its questions"
                    )
                if questions[number].id in wanted:
                    found[questions[number].id, 0] = reply
        return found or None
