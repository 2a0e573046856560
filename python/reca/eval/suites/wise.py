"""WISE: prompts that need world knowledge, scored by a VLM. Two suites for its two protocols (PKU-YuanGroup/WISE)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites import wise_rules
from reca.eval.suites.base import Item, Key, Score, Suite, Value, answered
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file

_VERIFIED_QUESTION = """\
You check whether a picture shows what its prompt implies, which needs knowledge of the world.
Prompt: {prompt}
What a right picture shows: {explanation}
Give 1 only if the picture shows it, else 0. Answer in one line:
Score: 0 or 1"""
_LEGACY_QUESTION = """\
You mark a picture that was made from a prompt which needs knowledge of the world.
Prompt: {prompt}
What a right picture shows: {explanation}
Give each mark as 0 (rejected), 1 (conditional) or 2 (exemplary): Consistency, how well the picture shows what the
prompt implies; Realism, how well it keeps to the laws of nature; Aesthetic Quality, how well it is made. Answer in
three lines:
Consistency: MARK
Realism: MARK
Aesthetic Quality: MARK"""


class Wise(Suite):
    """WISE_Verified, the benchmark's default: one binary mark per image. Image layout: <prompt_id>.png."""

    name = "wise"
    protocol = wise_rules.VERIFIED.name
    exact_judge = "Qwen3.5-35B-A3B by vLLM, with the prompt of WISE's vllm_eval.py"
    data_help = (
        "Use the folder of JSON files of github.com/PKU-YuanGroup/WISE (data_verified), which `reca get suite wise` "
        "downloads; it states no licence, so it is not part of this package."
    )
    rules: ClassVar[wise_rules.Protocol] = wise_rules.VERIFIED
    question: ClassVar[str] = _VERIFIED_QUESTION

    def items(self) -> list[Item]:
        root, items = self.data_path(), []
        for path in [root] if is_file(root) else sorted(root.glob("*.json")):
            try:
                for row in files.read_json(path, self.data_help):
                    number = int(row["prompt_id"])
                    category = self.rules.category(number) or row["Category"]
                    meta = {"explanation": row.get("Explanation", ""), "subcategory": row.get("Subcategory", "")}
                    items.append(Item(str(number), category, row["Prompt"], metadata=meta))
            except EvaluationError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(f"{path} is not a file of WISE: {error!r}. {self.data_help}") from error
        if not items:
            raise EvaluationError(f"{root} contains no prompts in .json files. {self.data_help}")
        return sorted(items, key=lambda item: int(item.id))

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        text = self.question.format(prompt=item.prompt, explanation=item.metadata["explanation"])
        return judge.reply(text, [image])

    def row(self, item: Item, answer: Any) -> dict[str, Any]:
        """Convert an answer to a row of WISE's result file. answer: the judge's reply, or an imported row."""
        marks = answer if isinstance(answer, Mapping) else self.marks(str(answer))
        return {**marks, "prompt_id": int(item.id)}

    def marks(self, reply: str) -> Mapping[str, Any]:
        return {"score": wise_rules.verified_mark(reply)}

    def value_of(self, row: Mapping[str, Any]) -> float | None:
        return wise_rules.verified_value(row)

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values, failed, rows = [], [], []
        for item, key, answer in answered(answers, items):
            row = self.row(item, answer)
            value = self.value_of(row)
            rows.append(row)
            if value is None:
                failed.append((key, f"the judge's reply contains no mark: {str(answer)[:200]!r}"))
            else:
                values.append(Value(*key, item.tag, value))
        means, overall = wise_rules.average(rows, self.rules, self.value_of)
        metrics: dict[str, Any] = {"categories": means, "overall": overall}
        present = {value.tag for value in values}
        complete = present == set(self.rules.weights)
        return Score(values, dict(self.rules.weights) if complete else None, metrics, failed)

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read the rows of WISE's result files, which have a prompt_id. Invalid lines are omitted."""
        found: dict[Key, Any] = {}
        for file in sorted(path.glob("*.jsonl")) if is_dir(path) else [path]:
            for line in files.read_lines(file, errors="replace"):
                try:
                    row = parse_json(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and "prompt_id" in row:
                    found[str(row["prompt_id"]), 0] = row
        return found or None


class WiseLegacy(Wise):
    """WISE's first protocol: three marks from 0 to 2 per image."""

    name = "wise_legacy"
    protocol = wise_rules.LEGACY.name
    exact_judge = "gpt-4o-2024-05-13, with the prompt of WISE_legacy"
    data_help = (
        "Use the folder WISE_legacy/data of github.com/PKU-YuanGroup/WISE, which `reca get suite wise_legacy` "
        "downloads; it states no licence, so it is not part of this package."
    )
    rules = wise_rules.LEGACY
    question = _LEGACY_QUESTION

    def marks(self, reply: str) -> Mapping[str, Any]:
        return wise_rules.legacy_marks(reply)

    def value_of(self, row: Mapping[str, Any]) -> float | None:
        """Return the WiScore; None if a mark is missing or outside [0, 2], such as the release's 9.9 for no mark."""
        marks = [row.get(name) for name in wise_rules.MARKS]
        good = all(isinstance(mark, int | float) and 0 <= mark <= 2 for mark in marks)
        return wise_rules.legacy_value(row) if good else None
