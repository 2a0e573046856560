"""DPG-Bench: long prompts, and questions about each that depend on one another (TencentQQGYLab/ELLA, dpg_bench)."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from reca.data.errors import DataError
from reca.eval.errors import EvaluationError
from reca.eval.suites import files
from reca.eval.suites.base import Item, Key, Score, Suite, Value, mean

DETAIL = re.compile(r"(.+?), (None|\([\d, ]+\)), (.+)")  # a line of the script's: image, cell, question and answer
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    id: int
    text: str
    parents: tuple[int, ...]  # 0: none
    category: str  # level 2, such as "entity - whole"


class Cell(NamedTuple):
    """Marks of one image: before and after those of questions with a wrong parent were set to 0."""

    answers: dict[int, float]
    score: float


class DpgScores(NamedTuple):
    """Figures of compute_dpg_bench.py. Means over nothing are absent."""

    per_image: dict[str, list[float]]  # file -> score per cell
    failed: dict[str, str]  # file -> why
    level1: dict[str, float]
    level2: dict[str, float]

    @property
    def final(self) -> float:
        return 100 * mean([mean(cells) for cells in self.per_image.values()])


def read_questions(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Question]]:
    """Group the rows of the table by item, as the public script does.

    It skips the first row, and where the rows of an item are apart, the later ones replace the earlier.
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
    """Score one image. An answer is right if it is exactly "yes". Raises KeyError for a parent that is missing.

    Questions are walked in the order of the table, so a chain falls only where parents come before children.
    """
    answers = {q.id: float(replies[q.id] == "yes") for q in questions}
    marks = dict(answers)
    for question in questions:
        if any(parent != 0 and marks[parent] == 0 for parent in question.parents):
            marks[question.id] = 0.0
    return Cell(answers, mean(list(marks.values())))


def score_images(
    questions: Mapping[str, Sequence[Question]], images: Iterable[tuple[str, str, Sequence[Mapping[int, str]]]]
) -> DpgScores:
    """Score images. images: (file, item, replies per cell).

    An image that cannot be scored is dropped from everything. Categories take the last cell alone.
    """
    per_image: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    level1: dict[str, list[float]] = {}
    level2: dict[str, list[float]] = {}
    for file, item, replies in images:
        try:
            asked = questions[item]
            cells = [score_cell(asked, reply) for reply in replies]
        except KeyError as error:
            failed[file] = f"{error} is missing: an item of the table, a question or the parent of one"
            continue
        per_image[file] = [cell.score for cell in cells]
        for question in asked:
            mark = cells[-1].answers[question.id]
            level2.setdefault(question.category, []).append(mark)
            level1.setdefault(question.category.split("-")[0].strip(), []).append(mark)
    means = ({name: 100 * mean(marks) for name, marks in level.items()} for level in (level1, level2))
    return DpgScores(per_image, failed, *means)


class Dpg(Suite):
    """Images lie as <item>.png, a grid of 2 x 2 (upstream), or as <item>_<k>.png (as the RECA release has them)."""

    name = "dpg"
    protocol = "DPG-Bench, one file per picture"
    images_per_item = 4
    exact_judge = "mPLUG-large (ModelScope damo/mplug_visual-question-answering_coco_large_en)"
    unit = "percent"
    data_help = (
        "Give the folder dpg_bench of github.com/TencentQQGYLab/ELLA, dpg_bench.csv and prompts/*.txt, which `reca get "
        "suite dpg` brings."
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
            raise EvaluationError(f"{self.data_path() / 'prompts'} holds no .txt files. {self.data_help}")
        return [
            Item(name, "all", files.read_text(path, self.data_help).strip(), metadata={"questions": table[name]})
            for name, path in prompts.items()
            if name in table
        ]

    def path(self, item: Item, k: int) -> str:
        return f"{item.id}_{k}.png"

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        files, known = {path.stem: path for path in sorted(images.glob("*.png"))}, {item.id: item for item in items}
        parts = [stem.rpartition("_") for stem in files if stem not in known]
        cells = {(item, int(k)): files[f"{item}_{k}"] for item, _, k in parts if item in known and k.isdecimal()}
        return cells or {(item, 0): files[item] for item in known if item in files}

    def layout(self) -> str:
        return "ITEM_K.png, or ITEM.png with a grid of 2 x 2"

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        """Ask every question of every cell."""
        from reca.data.pixels import open_rgb  # imports torch, which the names of suites do not need

        grid = open_rgb(image.read_bytes())
        if min(grid.size) < 2:
            raise DataError(f"{image} has {grid.width} x {grid.height} pixels, which are no grid of 2 x 2")
        cells = _quarters(grid) if image.stem == item.id else [grid]
        questions = item.metadata["questions"]
        texts = [f"{q.text} Answer in one word: yes or no." for q in questions]
        replies = [[judge.reply(text, [cell]) for text in texts] for cell in cells]
        return [
            {str(q.id): _yes_or_no(reply, q.text) for q, reply in zip(questions, cell, strict=True)} for cell in replies
        ]

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read the lines IMAGE, CELL, QUESTION, ANSWER of the file that ends in _detail.txt of the public script."""
        known, cells = {item.id: item for item in items}, dict[Key, dict[str, dict[str, str]]]()
        for line in files.read_lines(path):
            if (parts := DETAIL.fullmatch(line)) is None:
                continue
            stem = Path(parts[1].replace("\\", "/")).name.split(".")[0]
            name, _, k = (stem, "", "0") if stem in known else stem.rpartition("_")
            if name in known and k.isdecimal():
                answers = cells.setdefault((name, int(k)), {}).setdefault(parts[2], {})
                for question in known[name].metadata["questions"]:
                    if parts[3].startswith(f"{question.text}, "):
                        answers[str(question.id)] = parts[3].removeprefix(f"{question.text}, ")
        return {key: list(found.values()) for key, found in cells.items()} or None

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        tables = {item.id: item.metadata["questions"] for item in items}
        names = {f"{item}_{k}": (item, k) for item, k in answers}
        images = [
            (name, item, [{int(q): reply for q, reply in cell.items()} for cell in answers[item, k]])
            for name, (item, k) in names.items()
        ]
        scores = score_images(tables, images)
        values = [
            Value(*names[name], "all", 100 * mean(cells), _wrong(tables[names[name][0]], answers[names[name]]))
            for name, cells in scores.per_image.items()
        ]
        metrics: dict[str, Any] = {"level1": scores.level1, "level2": scores.level2}
        if values:
            metrics["final"] = scores.final
        return Score(values, None, metrics, [(names[name], why) for name, why in scores.failed.items()])


def _yes_or_no(reply: str, question: str) -> str:
    """Read a reply by its first word, whatever signs stand around it. Raises DataError for another, as of a refusal."""
    if (word := re.match(r"[\W_]*(yes|no)(?![^\W_])", reply, re.IGNORECASE)) is None:
        raise DataError(f"the judge's reply to {question!r} is neither yes nor no: {reply[:200]!r}")
    return word[1].lower()


def _quarters(grid: Image.Image) -> list[Image.Image]:
    """Cut a grid into its four cells: top left, top right, bottom left, bottom right."""
    w, h = grid.width // 2, grid.height // 2
    return [grid.crop((x, y, x + w, y + h)) for y in (0, h) for x in (0, w)]


def _wrong(questions: Sequence[Question], cells: Sequence[Mapping[str, str]]) -> str:
    """List the questions of the last cell that were not answered by yes."""
    return "; ".join(q.text for q in questions if cells[-1][str(q.id)] != "yes")
