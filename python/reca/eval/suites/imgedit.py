"""ImgEdit: 737 single edits of nine types, each given three marks by a VLM (PKU-YuanGroup/ImgEdit, Benchmark/Basic)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import Item, Key, Score, Suite, Value, answered, mean
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file


def read_marks(reply: str) -> float | None:
    """Parse ImgEdit's marks, lines "name: digits", and return their mean, rounded to two digits. None: no marks.

    Raises ValueError, as the public script does, for digits that int() rejects, such as superscripts.
    """
    marks = []
    for line in reply.splitlines():
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdigit():
            marks.append(int(parts[1]))
    return round(sum(marks) / len(marks), 2) if marks else None


class ImgEditScores(NamedTuple):
    """Metrics of the public scripts: means of items' rounded marks, rounded to two digits."""

    types: dict[str, float]
    overall: float | None  # mean over all items, including those without a type, as in the RECA release and UGE


def aggregate(marks: Mapping[str, float], edit_types: Mapping[str, str | None]) -> ImgEditScores:
    """Average the marks of items, by edit type and overall. edit_types: item -> type, None or absent if it has none."""
    types: dict[str, list[float]] = {}
    for key, value in marks.items():
        if edit_types.get(key):
            types.setdefault(str(edit_types[key]), []).append(value)
    means = {name: round(mean(values), 2) for name, values in types.items()}
    return ImgEditScores(means, round(mean(list(marks.values())), 2) if marks else None)


class ImgEdit(Suite):
    """Image layout: <key>.png."""

    name = "imgedit"
    protocol = "ImgEdit-Bench, Basic"
    ability = "edit"
    exact_judge = "gpt-4o-2024-11-20 (the RECA release: gpt-4.1-2025-04-14)"
    unit = "points"
    data_help = (
        "Use the folder with Benchmark.tar of huggingface.co/datasets/sysuyy/ImgEdit unpacked: singleturn.json, "
        "judge_prompt.json and the images; it states no licence, so it is not part of this package."
    )

    def _json(self, *names: str) -> dict[str, Any] | None:
        """Read the first of these files that exists; None if none does."""
        root = self.data_path()
        for name in names:
            for path in [root / name, *sorted(root.rglob(name))]:
                if is_file(path):
                    found = files.read_json(path, self.data_help)
                    if not isinstance(found, dict):
                        raise EvaluationError(f"{path} is not a JSON object. {self.data_help}")
                    return found
        return None

    def items(self) -> list[Item]:
        rows, root = self._json("singleturn.json", "basic_edit.json"), self.data_path()
        if rows is None:
            raise EvaluationError(f"{root} contains no singleturn.json or basic_edit.json. {self.data_help}")
        questions = self._json("judge_prompt.json", "prompts.json") or {}  # needed by the judge only
        roots = [root, *(p for p in sorted(root.rglob("singleturn")) if is_dir(p))]
        items = []
        for key, row in rows.items():
            try:
                source = next((r / row["id"] for r in roots if is_file(r / row["id"])), root / row["id"])
                meta = {"question": questions.get(row["edit_type"])}
                items.append(Item(key, row["edit_type"], row["prompt"], source, meta))
            except (KeyError, TypeError) as error:
                raise EvaluationError(
                    f"{root}: item {key!r} is not an item of ImgEdit: {error!r}. {self.data_help}"
                ) from error
        return items

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        if not isinstance(question := item.metadata["question"], str):
            raise EvaluationError(
                f"{self.data_path()} contains no judge_prompt.json or prompts.json with a text for edits of type "
                f"{item.tag}. {self.data_help}"
            )
        return judge.reply(question.replace("<edit_prompt>", item.prompt), [item.source, image])

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values, failed = [], []
        for item, key, answer in answered(answers, items):
            try:
                mark = read_marks(answer) if isinstance(answer, str) else None
            except ValueError:
                mark = None
            if mark is None:
                failed.append((key, f"the judge's reply contains no mark: {str(answer)[:200]!r}"))
            else:
                values.append(Value(*key, item.tag, mark))
        scores = aggregate({v.item: v.value for v in values}, {item.id: item.tag for item in items})
        return Score(values, None, {"types": scores.types, "overall": scores.overall}, failed)

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read result.json (key -> reply), or the RECA release's result.jsonl with lines {"key", "result"}."""
        keys = {item.id for item in items}
        if path.suffix == ".jsonl":
            lines = [row for row in map(_parsed, files.read_lines(path, errors="replace")) if isinstance(row, dict)]
            rows = {str(row["key"]): row["result"] for row in lines if row.keys() >= {"key", "result"}}
        else:
            rows = _parsed(files.read_text(path))
        if not isinstance(rows, dict):
            return None
        return {(key, 0): reply for key, reply in rows.items() if key in keys} or None


def _parsed(text: str) -> Any:
    """Parse JSON; None if it is invalid, for example a truncated line."""
    try:
        return parse_json(text)
    except ValueError:
        return None
