"""MME: two yes-or-no questions about each image, answered by the evaluated model and parsed by rule."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import Item, Key, Score, Suite, Value, mean
from reca.io.paths import is_dir, is_file

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
GROUPS = {"perception": PERCEPTION, "cognition": COGNITION}


class Answered(NamedTuple):
    """One question with the model's reply."""

    category: str
    question_id: str  # name of the image
    truth: str
    reply: str


def harness_answer(reply: str) -> str:
    """Parse a reply as yes, no or other, as lmms-eval does."""
    text = reply.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def release_reply(reply: str) -> str:
    """Rewrite an answer as the RECA release does before writing it to the files for MME's script."""
    text = reply.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    return text.lower().replace("true", "yes").replace("false", "no")


def release_answer(reply: str) -> str:
    """Parse a reply as yes, no or other, as the MME script of the RECA release does."""
    text = reply.lower()
    if text in ("yes", "no"):
        return text
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def harness(rows: Sequence[Answered]) -> dict[str, float | None]:
    """Compute the perception and cognition scores as lmms-eval does; None for a group without rows.

    Raises ValueError for an image without exactly two answers.
    """
    images: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        hit = harness_answer(row.reply) == row.truth.lower().strip().replace(".", "")
        images.setdefault((row.category, row.question_id), []).append(hit)
    categories: dict[str, list[float]] = {}
    for (category, image), right in images.items():
        if len(right) != 2:
            raise ValueError(f"image {image} of {category} has {len(right)} answers; MME has 2 questions for each")
        categories.setdefault(category, []).append(image_score(right))
    totals: dict[str, float | None] = {}
    for group, names in GROUPS.items():
        found = [mean(categories[name]) for name in names if name in categories]
        totals[group] = sum(found) if found else None
    return totals


def image_score(right: Sequence[bool]) -> float:
    """Return 100 times the fraction of correct answers, plus 100 if all are correct."""
    return 100 * sum(right) / len(right) + 100 * all(right)


def release(rows: Sequence[Answered]) -> dict[str, Any]:
    """Compute the scores as the script of the RECA release does, which pairs consecutive questions.

    Raises ValueError if one of the 14 tasks is missing or has an odd number of answers.
    """
    by_task: dict[str, list[bool]] = {}
    for row in rows:
        by_task.setdefault(row.category, []).append(release_answer(row.reply) == row.truth.lower())
    tasks: dict[str, float] = {}
    for name in PERCEPTION + COGNITION:
        right = by_task.get(name, [])
        if not right or len(right) % 2:
            raise ValueError(f"task {name} of MME has {len(right)} answers; expected an even number, at least 2")
        both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
        tasks[name] = 100 * mean(right) + 100 * mean(both)
    groups = {group: sum(tasks[name] for name in names) for group, names in GROUPS.items()}
    return groups | {"tasks": tasks}


class Mme(Suite):
    """A suite of answers. Item ids are TASK/IMAGE/NUMBER."""

    name = "mme"
    protocol = "MME, rule of lmms-eval"
    ability = "answer"
    judge_kind = "rule"
    unit = "points"
    data_help = (
        "Use the folder MME_Benchmark_release_version: a folder per task with images and a .txt file for each, whose "
        "two lines are QUESTION <tab> Yes or No (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models)."
    )

    def items(self) -> list[Item]:
        root, items = self.data_path(), []
        if is_dir(inside := root / "MME_Benchmark"):  # the archive's top folder
            root = inside
        for task in PERCEPTION + COGNITION:
            for text in sorted((root / task).rglob("*.txt")):
                image = _image_of(text)
                if image is None:
                    continue
                lines = [line for line in files.read_lines(text, self.data_help) if line.strip()]
                for number, line in enumerate(lines):
                    question, tab, truth = line.rpartition("\t")
                    if not tab:
                        raise EvaluationError(f"{text}, line {number + 1}: expected QUESTION <tab> ANSWER")
                    meta = {"image": image.name, "truth": truth.strip()}
                    items.append(Item(f"{task}/{image.stem}/{number}", task, question.strip(), image, meta))
        if not items:
            raise EvaluationError(f"{root} contains no images with questions of MME. {self.data_help}")
        return items

    def group(self, item: Item) -> str:
        return item.id.rpartition("/")[0]  # the image, with both questions

    def path(self, item: Item, k: int) -> str:
        return "answers.jsonl"

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        images: dict[tuple[str, str], list[tuple[Item, str]]] = {}
        values, failed, rows = [], [], []
        for item in items:
            key = (item.id, 0)
            if key in answers and not isinstance(answers[key], str):
                failed.append((key, f"the answer is not a string: {answers[key]!r:.200}"))
            elif key in answers:
                where = (item.tag, str(item.metadata["image"]))
                images.setdefault(where, []).append((item, answers[key]))
        for (task, image), asked in images.items():
            if len(asked) != 2:
                failed.append(((asked[0][0].id, 0), f"image {image} has {len(asked)} answers; MME needs 2"))
                continue
            right = [harness_answer(reply) == item.metadata["truth"].lower() for item, reply in asked]
            wrong = [f"{i.prompt} -> {reply}" for (i, reply), ok in zip(asked, right, strict=True) if not ok]
            values.append(Value(asked[0][0].id, 0, task, image_score(right), "; ".join(wrong)))
            rows += [Answered(task, image, item.metadata["truth"], reply) for item, reply in asked]
        metrics: dict[str, Any] = dict(harness(rows))
        if {row.category for row in rows} == {*PERCEPTION, *COGNITION}:
            metrics["release"] = release([row._replace(reply=release_reply(row.reply)) for row in rows])
        return Score(values, {tag: 1.0 for tag in {v.tag: None for v in values}}, metrics, failed)

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read a folder of TASK.txt files with lines image, question, truth, reply, separated by tabs.

        Questions are compared by prefix, since the RECA release appends a request for a single word to them.
        """
        if not is_dir(path):
            return None
        known: dict[tuple[str, str], list[Item]] = {}
        for item in items:
            known.setdefault((item.tag, item.metadata["image"]), []).append(item)
        found: dict[Key, Any] = {}
        for file in sorted(path.glob("*.txt")):
            for line in files.read_answer_lines(file, lambda last: harness_answer(_reply(last)) != "other"):
                cells = line.split("\t")
                image = known.get((file.stem, cells[0]), ()) if len(cells) >= 4 else ()
                if asked := [item for item in image if cells[1].startswith(item.prompt)]:
                    found[max(asked, key=lambda item: len(item.prompt)).id, 0] = _reply(line)
        return found


def _reply(line: str) -> str:
    return "\t".join(line.split("\t")[3:])


def _image_of(text: Path) -> Path | None:
    """Find the image of a text file: in the same folder, or in a sibling folder `images`."""
    for folder in (text.parent, text.parent.parent / "images"):
        for suffix in (".jpg", ".png", ".jpeg"):
            if is_file(image := folder / (text.stem + suffix)):
                return image
    return None
