"""DPG-Bench: long prompts, each with questions that depend on one another (TencentQQGYLab/ELLA, dpg_bench)."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from reca.data.errors import DataError
from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import Item, Key, Score, Suite, Value, answered, mean

DETAIL = re.compile(r"(.+?), (None|\([\d, ]+\)), (.+)")  # output line: image, cell, question and answer
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    id: int
    text: str
    parents: tuple[int, ...]  # 0: none
    category: str  # level 2, such as "entity - whole"


class Cell(NamedTuple):
    """Scores of one image."""

    answers: dict[int, float]  # question -> 1 for yes, else 0
    score: float  # mean after the questions with a failed parent are set to 0


class DpgScores(NamedTuple):
    """Metrics of compute_dpg_bench.py. Categories without questions are absent."""

    per_image: dict[Any, list[float]]  # image -> score per cell
    failed: dict[Any, str]  # image -> why
    level1: dict[str, float]
    level2: dict[str, float]

    @property
    def final(self) -> float:
        return 100 * mean([mean(cells) for cells in self.per_image.values()])


def read_questions(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Question]]:
    """Group the rows of the table by item, as the public script does.

    Like the script, skip the first row; if the rows of an item are not consecutive, later ones replace earlier ones.
    """
    questions: dict[str, list[Question]] = {}
    current = None
    for number, row in enumerate(rows):
        if number == 0:
            continue
        item = str(row["item_id"])
        if item != current:
            questions[item], current = [], item
        parents = tuple(int(part) for part in str(row["dependency"]).split(","))
        category = str(row["tuple"]).split("(")[0].strip()
        text = str(row["question_natural_language"])
        questions[item].append(Question(int(row["proposition_id"]), text, parents, category))
    return questions


def score_cell(questions: Sequence[Question], replies: Mapping[int, str]) -> Cell:
    """Score one image. An answer is correct if it is exactly "yes". Raises KeyError for a missing parent or reply.

    Questions are processed in table order, so a failure propagates along a chain only if parents precede children.
    """
    answers = {q.id: float(replies[q.id] == "yes") for q in questions}
    marks = dict(answers)
    for question in questions:
        if any(parent != 0 and marks[parent] == 0 for parent in question.parents):
            marks[question.id] = 0.0
    return Cell(answers, mean(list(marks.values())))


def score_images(
    questions: Mapping[str, Sequence[Question]], images: Iterable[tuple[Any, str, Sequence[Mapping[int, str]]]]
) -> DpgScores:
    """Score images. images: (any name of the image, item, replies per cell).

    An image that cannot be scored is excluded from all metrics. As in the script, categories use the last cell only.
    """
    per_image: dict[Any, list[float]] = {}
    failed: dict[Any, str] = {}
    level1: dict[str, list[float]] = {}
    level2: dict[str, list[float]] = {}
    for name, item, replies in images:
        try:
            asked = questions[item]
            cells = [score_cell(asked, reply) for reply in replies]
        except KeyError as error:
            failed[name] = f"{error} is missing: an item of the table, a reply, or the parent of a question"
            continue
        per_image[name] = [cell.score for cell in cells]
        for question in asked:
            mark = cells[-1].answers[question.id]
            level2.setdefault(question.category, []).append(mark)
            level1.setdefault(question.category.split("-")[0].strip(), []).append(mark)
    means = ({name: 100 * mean(marks) for name, marks in level.items()} for level in (level1, level2))
    return DpgScores(per_image, failed, *means)


class Dpg(Suite):
    """Image layout: <item>.png, a grid of 2 x 2 (upstream), or <item>_<k>.png (RECA release)."""

    name = "dpg"
    protocol = "DPG-Bench, one file per picture"
    images_per_item = 4
    exact_judge = "mPLUG-large (ModelScope damo/mplug_visual-question-answering_coco_large_en)"
    unit = "percent"
    data_help = (
        "Use the folder dpg_bench of github.com/TencentQQGYLab/ELLA, dpg_bench.csv and prompts/*.txt, which `reca get "
        "suite dpg` downloads."
    )

    def table(self) -> dict[str, list[Question]]:
        path = self.data_path() / "dpg_bench.csv"
        reader = csv.DictReader(io.StringIO(files.read_text(path, self.data_help)))
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise EvaluationError(f"{path} has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
        try:
            return read_questions(reader)
        except (ValueError, csv.Error) as error:
            raise EvaluationError(f"{path}, line {reader.line_num}: {error}. {self.data_help}") from error

    def items(self) -> list[Item]:
        table = self.table()
        prompts = {path.stem: path for path in sorted((self.data_path() / "prompts").glob("*.txt"))}
        if not prompts:
            raise EvaluationError(f"{self.data_path() / 'prompts'} contains no .txt files. {self.data_help}")
        return [
            Item(name, "all", files.read_text(path, self.data_help).strip(), metadata={"questions": table[name]})
            for name, path in prompts.items()
            if name in table
        ]

    def path(self, item: Item, k: int) -> str:
        return f"{item.id}_{k}.png"

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        paths, known = {path.stem: path for path in sorted(images.glob("*.png"))}, {item.id for item in items}
        parts = [stem.rpartition("_") for stem in paths if stem not in known]
        cells = {(item, int(k)): paths[f"{item}_{k}"] for item, _, k in parts if item in known and k.isdecimal()}
        return cells or {(item.id, 0): paths[item.id] for item in items if item.id in paths}

    def layout(self) -> str:
        return "ITEM_K.png, or ITEM.png with a grid of 2 x 2"

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        """Ask every question about every cell."""
        from reca.data.pixels import open_rgb  # imports torch, which listing the suites does not need

        grid = open_rgb(image.read_bytes())
        if min(grid.size) < 2:
            raise DataError(f"{image} has {grid.width} x {grid.height} pixels, too few for a grid of 2 x 2")
        cells = _quarters(grid) if image.stem == item.id else [grid]
        questions = item.metadata["questions"]
        texts = [f"{q.text} Answer in one word: yes or no." for q in questions]
        replies = [[judge.reply(text, [cell]) for text in texts] for cell in cells]
        return [
            {str(q.id): _yes_or_no(reply, q.text) for q, reply in zip(questions, cell, strict=True)} for cell in replies
        ]

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read the public script's file *_detail.txt, with lines IMAGE, CELL, QUESTION, ANSWER.

        The script asks about as many cells of every image. One with fewer, at which it was interrupted, is omitted.
        """
        known, cells = {item.id: item for item in items}, dict[Key, dict[str, dict[str, str]]]()
        for line in files.read_answer_lines(path, lambda last: last.endswith((", yes", ", no"))):
            if (parts := DETAIL.fullmatch(line)) is None:
                continue
            stem = Path(parts[1].replace("\\", "/")).name.split(".")[0]
            name, _, k = (stem, "", "0") if stem in known else stem.rpartition("_")
            if name in known and k.isdecimal():
                answers = cells.setdefault((name, int(k)), {}).setdefault(parts[2], {})
                for question in known[name].metadata["questions"]:
                    if parts[3].startswith(f"{question.text}, "):
                        answers[str(question.id)] = parts[3].removeprefix(f"{question.text}, ")
        whole = max(map(len, cells.values()), default=0)
        return {key: list(found.values()) for key, found in cells.items() if len(found) == whole} or None

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        tables = {item.id: item.metadata["questions"] for item in items}
        images = [
            (key, item.id, [{int(q): reply for q, reply in cell.items()} for cell in cells])
            for item, key, cells in answered(answers, items)
        ]
        scores = score_images(tables, images)
        values = [
            Value(item, k, "all", 100 * mean(cells), _wrong(tables[item], answers[item, k]))
            for (item, k), cells in scores.per_image.items()
        ]
        metrics: dict[str, Any] = {"level1": scores.level1, "level2": scores.level2}
        if values:
            metrics["final"] = scores.final
        return Score(values, None, metrics, list(scores.failed.items()))


def _yes_or_no(reply: str, question: str) -> str:
    """Return the first word of a reply, ignoring punctuation. Raises DataError unless it is yes or no."""
    if (word := re.match(r"[\W_]*(yes|no)(?![^\W_])", reply, re.IGNORECASE)) is None:
        raise DataError(f"the judge's reply to {question!r} is neither yes nor no: {reply[:200]!r}")
    return word[1].lower()


def _quarters(grid: Image.Image) -> list[Image.Image]:
    """Split a grid into its four cells: top left, top right, bottom left, bottom right."""
    w, h = grid.width // 2, grid.height // 2
    return [grid.crop((x, y, x + w, y + h)) for y in (0, h) for x in (0, w)]


def _wrong(questions: Sequence[Question], cells: Sequence[Mapping[str, str]]) -> str:
    """List the questions about the last cell that were not answered with yes."""
    return "; ".join(q.text for q in questions if cells[-1][str(q.id)] != "yes")
