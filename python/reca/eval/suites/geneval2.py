"""GenEval 2: probabilities of a VLM's answers to questions about each atom of a prompt (Soft-TIFA).

Source: facebookresearch/GenEval2, evaluation.py and soft_tifa_analysis.py. Its data is CC BY-NC and not shipped.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import Item, Key, Score, Suite, Value, answered, mean
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file

NUMBERS = "one two three four five six seven eight nine ten".split()
DIGITS = {word: str(i + 1) for i, word in enumerate(NUMBERS)}
YES = ("Yes", "yes", " yes", " Yes")
SKILLS = ("object", "attribute", "count", "position", "verb")
ATOM_COUNTS = range(3, 11)
SUFFIX = " Answer in one word."


def accepted(question: str, answer: str) -> list[str]:
    """Return the strings that count as the correct answer to a question."""
    if not question.startswith("How many"):
        return list(YES)
    digits = DIGITS.get(answer, "other")
    big = answer.capitalize()
    return [answer, big, f" {answer}", f" {big}", digits, f" {digits}"]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; 0 if any value is 0 or less."""
    if any(value <= 0 for value in values):
        return 0.0
    return math.exp(sum(math.log(value) for value in values) / len(values))


class Analysis(NamedTuple):
    """Means of soft_tifa_analysis.py in percent; None without data."""

    per_skill: dict[str, float | None]
    per_atom_count: dict[int, tuple[int, float | None]]  # prompts, 100 * mean of geometric means


def analyse(prompts: Sequence[tuple[int, Sequence[str], Sequence[float]]]) -> Analysis:
    """Average over atoms by skill, and over prompts by number of atoms. prompts: (atom_count, skills, scores).

    Raises ValueError for an unknown skill or number of atoms, and for a prompt without scores.
    """
    skills: dict[str, list[float]] = {name: [] for name in SKILLS}
    counts: dict[int, list[float]] = {count: [] for count in ATOM_COUNTS}
    for count, names, scores in prompts:
        if count not in counts or not scores or any(name not in skills for name in names):
            raise ValueError(
                f"a prompt with {count} atoms, {len(scores)} answers and skills {', '.join(names)} is not of GenEval 2"
            )
        counts[count].append(geometric_mean(scores))
        for name, value in zip(names, scores, strict=True):
            skills[name].append(value)

    def percent(values: list[float]) -> float | None:
        return 100 * mean(values) if values else None

    per_count = {count: (len(values), percent(values)) for count, values in counts.items()}
    return Analysis({name: percent(values) for name, values in skills.items()}, per_count)


class GenEval2(Suite):
    """Image layout: <row>.png, or any paths listed in image_paths.json (prompt -> path), as in the script."""

    name = "geneval2"
    protocol = "GenEval 2, Soft-TIFA"
    exact_judge = "Qwen3-VL-8B-Instruct"
    exact_models = ("Qwen3-VL-8B-Instruct",)
    unit = "percent"
    data_help = (
        "Use geneval2_data.jsonl of github.com/facebookresearch/GenEval2, which `reca get suite geneval2` downloads; "
        "it is CC BY-NC 4.0, so it is not part of this package."
    )

    def items(self) -> list[Item]:
        path = self.data_path()
        path = path / "geneval2_data.jsonl" if is_dir(path) else path
        numbers = itertools.count()
        return self.read_lines(path, lambda row: self._item(next(numbers), row))

    def _item(self, number: int, row: Any) -> Item:
        questions = [(str(question), str(answer)) for question, answer in row["vqa_list"]]
        analyse([(row["atom_count"], row["skills"], [1.0] * len(questions))])
        meta = {"questions": questions, "skills": row["skills"], "atom_count": row["atom_count"]}
        return Item(f"{number:05d}", f"{row['atom_count']} atoms", row["prompt"], metadata=meta)

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        listed = images / "image_paths.json"
        if not is_file(listed):
            return super().find(images, items)
        paths = files.read_json(listed, "expected {prompt: path of its image}")
        if not isinstance(paths, dict) or not all(isinstance(path, str) for path in paths.values()):
            raise EvaluationError(f"{listed}: expected {{prompt: path of its image}}")
        given = [((item.id, 0), Path(paths[item.prompt])) for item in items if item.prompt in paths]
        places = {key: next((p for p in (images / path, path) if is_file(p)), None) for key, path in given}
        return {key: path for key, path in places.items() if path is not None}

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        return [
            judge.first_token_probability(question + SUFFIX, [image], accepted(question, answer))
            for question, answer in item.metadata["questions"]
        ]

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values, failed, rows, arithmetic = [], [], [], []
        for item, key, scores in answered(answers, items):
            questions = item.metadata["questions"]
            if len(scores) != len(questions):
                failed.append((key, f"{len(scores)} answers to {len(questions)} questions"))
                continue
            low = [q for (q, _), value in zip(questions, scores, strict=True) if value < 0.5]
            values.append(Value(*key, item.tag, 100 * geometric_mean(scores), "; ".join(low)))
            rows.append((item.metadata["atom_count"], item.metadata["skills"], scores))
            arithmetic.append(100 * mean(scores))
        metrics: dict[str, Any] = {}
        if values:
            analysis = analyse(rows)
            metrics = {
                "soft_tifa_am": mean(arithmetic),
                "soft_tifa_gm": mean([v.value for v in values]),
                "per_skill": analysis.per_skill,
                "per_atom_count": {str(n): figure for n, (_, figure) in analysis.per_atom_count.items()},
            }
        return Score(values, None, metrics, failed)

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read the scores that evaluation.py writes: one list per prompt, in the order of the data."""
        text = files.read_text(path)
        try:
            rows = parse_json(text)
        except ValueError:
            return None
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            return None
        return {(item.id, 0): rows[int(item.id)] for item in items if int(item.id) < len(rows)} or None
