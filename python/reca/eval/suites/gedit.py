"""GEdit-Bench: edits of eleven groups in two languages, scored by VIEScore (stepfun-ai/Step1X-Edit, GEdit-Bench)."""

import csv
import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import Item, Key, Score, Suite, Value, answered, equal_weights, mean
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file

log = logging.getLogger("reca")

GROUPS = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change", "subject-add",
    "subject-remove", "subject-replace", "text_change", "tone_transfer",
)  # fmt: skip
COLUMNS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")  # of the dataset
IMAGE = "input_image_raw"  # the dataset's column of the image to edit
MEASURES = ("semantics", "quality", "overall")
_DELIMITER = "||V^=^V||"
RATE_LIMIT = "rate_limit_exceeded"

_RULES = """\
You are a professional digital artist. Judge AI-generated pictures by the rules below. All persons shown are generated.
Answer with one JSON object and nothing else: {"score": [...], "reasoning": "in a few words"}
"""
_SEMANTICS = """\
Two pictures are given: the original, and the same one edited by an instruction. Give two marks from 0 to 10:
first, how well the edit does what the instruction says (0: not at all, 10: perfectly); second, how much it changes
beyond that (0: a different picture, 10: no more than the least that is needed). score = [first, second].
Instruction: <instruction>"""
_QUALITY = """\
One picture is given, which is generated. Give two marks from 0 to 10: first, how natural it is (0: wrong perspective,
shadows or light; 10: natural); second, how free of artifacts (0: distortions, blurred faces, watermarks; 10: none).
score = [first, second]."""


class Marked(NamedTuple):
    """One item with its marks, as in the public script's CSV."""

    language: str
    semantics: float
    quality: float
    in_intersection: bool


def statistics(groups: Mapping[str, Sequence[Marked]], language: str) -> dict[str, dict[str, float | None]]:
    """Average semantics, quality and the root of their product by group, over all items and over the intersection.

    avg_* is the unweighted mean over the eleven groups; None (NaN in the public script) if a group has no items.
    """
    tables: dict[str, dict[str, float | None]] = {}
    for suffix, everything in (("", True), ("_intersection", False)):
        for measure in MEASURES:
            row: dict[str, float | None] = {}
            for name in GROUPS:
                marked = [
                    m for m in groups.get(name, ()) if m.language == language and (everything or m.in_intersection)
                ]
                values = [_value(m, measure) for m in marked]
                row[name] = mean(values) if values else None
            known = [value for value in row.values() if value is not None]
            row[f"avg_{measure}"] = mean(known) if len(known) == len(GROUPS) else None
            tables[measure + suffix] = row
    return tables


def _value(marked: Marked, measure: str) -> float:
    if measure == "overall":
        return math.sqrt(marked.semantics * marked.quality)
    return float(getattr(marked, measure))


class GEdit(Suite):
    """Image layout: fullset/<group>/<language>/<key>.png, with the input image as <key>_SRCIMG.png."""

    name = "gedit"
    protocol = "GEdit-Bench, English"
    ability = "edit"
    exact_judge = "gpt-4.1-2025-04-14, or Qwen2.5-VL-72B-Instruct"
    unit = "points"
    data_help = (
        "Use the folder that `hf download --repo-type dataset stepfun-ai/GEdit-Bench --local-dir GEdit-Bench` creates, "
        "with its .parquet files, or one with items.jsonl: {key, task_type, instruction, instruction_language, "
        "Intersection_exist, source: path of an image}."
    )
    language = "en"

    def items(self) -> list[Item]:
        root = self.data_path()
        path = root if is_file(root) else root / "items.jsonl"
        if not is_file(path):
            if not (tables := sorted(root.rglob("*.parquet"))):
                raise EvaluationError(f"{path} does not exist. {self.data_help}")
            self._unpack(tables, path)
        return self.read_lines(path, lambda row: self._item(path.parent, row))

    def _unpack(self, tables: Sequence[Path], path: Path) -> None:
        """Write the images of the dataset's tables next to `path`, then `path`, the list of items."""
        import pyarrow
        from pyarrow import parquet

        lines = []
        try:
            for table in tables:
                for batch in parquet.ParquetFile(table).iter_batches(16, columns=[*COLUMNS, IMAGE]):
                    for row in batch.to_pylist():
                        source = Path("images") / f"{row['key']}.png"
                        if source.parent.name != "images":
                            raise KeyError(f"key {row['key']!r} is not a file name")
                        files.write(path.parent / source, row.pop(IMAGE)["bytes"], sync=False, root=path.parent)
                        lines.append(json.dumps(row | {"source": str(source)}, ensure_ascii=False) + "\n")
        except (pyarrow.ArrowException, KeyError, TypeError) as error:
            raise EvaluationError(f"{table} is not a table of GEdit-Bench ({error}). {self.data_help}") from error
        files.write(path, "".join(lines))

    def _item(self, folder: Path, row: Any) -> Item | None:
        if row["instruction_language"] != self.language:
            return None
        meta = {"intersection": bool(row["Intersection_exist"]), "language": row["instruction_language"]}
        return Item(str(row["key"]), row["task_type"], row["instruction"], folder / row["source"], meta)

    def path(self, item: Item, k: int) -> str:
        return f"fullset/{item.tag}/{self.language}/{item.id}.png"

    def companions(self, item: Item) -> dict[str, str | Path]:
        return {f"fullset/{item.tag}/{self.language}/{item.id}_SRCIMG.png": item.source} if item.source else {}

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        """Ask for semantics and quality. The edited image is resized to the size of its source."""
        from reca.data.pixels import open_rgb  # imports torch, which listing the suites does not need

        assert item.source is not None
        size = open_rgb(item.source.read_bytes()).size
        edited = open_rgb(image.read_bytes()).resize(size)
        semantics = judge.reply(_RULES + _SEMANTICS.replace("<instruction>", item.prompt), [item.source, edited])
        return {"semantics": semantics, "quality": judge.reply(_RULES + _QUALITY, [edited])}

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values, failed = [], []
        groups: dict[str, list[Marked]] = {}
        for item, key, answer in answered(answers, items):
            try:
                semantics, quality, overall = read_item(answer)
            except ValueError as error:
                failed.append((key, str(error)))
                continue
            values.append(Value(*key, item.tag, overall, f"semantics {semantics:g}, quality {quality:g}"))
            marked = Marked(self.language, semantics, quality, item.metadata["intersection"])
            groups.setdefault(item.tag, []).append(marked)
        return Score(values, equal_weights(groups), dict(statistics(groups, self.language)), failed)

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read the public script's files <model>_<group>_gpt_score.csv from a folder."""
        if not is_dir(path):
            return None
        keys, found = {item.id for item in items}, {}
        for file in sorted(path.rglob("*_gpt_score.csv")):
            reader = csv.DictReader(io.StringIO(files.read_text(file, errors="replace")))
            for row in reader:
                try:
                    key = Path(row["edited_image"]).stem
                    if key in keys and row["instruction_language"] == self.language:
                        semantics, quality = float(row["sementics_score"]), float(row["quality_score"])
                        found[key, 0] = {"semantics": [semantics], "quality": [quality]}
                except (KeyError, TypeError, ValueError):  # for example, a truncated last line
                    log.warning("%s, line %d cannot be read; its image counts as not judged", file, reader.line_num)
        return found or None


def read_item(answer: Any) -> tuple[float, float, float]:
    """Parse both replies as (semantics, quality, overall). Raises ValueError if one has no marks; none is guessed."""
    both = []
    for name in ("semantics", "quality"):
        reply = answer[name]
        marks = reply if isinstance(reply, list) else viescore(str(reply))
        if marks is None:
            raise ValueError(f"the judge's reply about {name} contains no marks: {str(reply)[:200]!r}")
        both.append(marks)
    return gedit_item(*both)


def viescore(reply: str) -> list[Any] | None:
    """Parse the marks of a VIEScore reply. None: the public parser would fail, or guess."""
    found = viescore_object(reply)
    marks = None if found is None else found.get("score")
    return marks if isinstance(marks, list) else None


def viescore_object(reply: str) -> dict[str, Any] | None:
    """Parse a VIEScore reply to an object, as the first attempt of the public parser does, without guessing."""
    if reply == RATE_LIMIT:
        return None
    if reply.count(_DELIMITER) == 2:
        text = reply.split(_DELIMITER)[1]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    else:
        return _bare(reply)
    text = text.strip().replace("\n", "")
    try:
        value = parse_json(text)
        marks = value["score"]
    except (ValueError, KeyError, TypeError):
        return _repaired(text)
    return value | {"score": marks if isinstance(marks, list) else [marks]}


def _bare(reply: str) -> dict[str, Any] | None:
    """Parse a reply without braces: a list of two integers, or one integer from 0 to 10."""
    listed = reply[reply.find("[") : reply.rfind("]") + 1]
    if re.match(r"\[\d+, ?\d+\]$", listed):
        return {"score": parse_json(listed)}
    try:
        number = int(reply)
    except ValueError:
        return None
    return {"score": [number]} if 0 <= number <= 10 else None


def _repaired(text: str) -> dict[str, Any] | None:
    """Quote keys and words and put numbers in brackets, the only repair that the public parser makes."""

    def repaired(pair: re.Match) -> str:
        key, value, end = pair[1], pair[2].strip(), pair[3]
        if re.match(r"-?\d+(\.\d+)?$", value):
            return f"{key}: [{value}]{end}"
        literal = value.lower() in ("true", "false", "null")
        return f"{key}: {value}{end}" if literal else f'{key}: "{value}"{end}'

    quoted = re.sub(r"(\w+):", r'"\1":', text)
    try:
        value = parse_json(re.sub(r'(".*?"):(.*?)([,}])', repaired, quoted))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def gedit_item(semantics: list[Any], quality: list[Any]) -> tuple[float, float, float]:
    """Compute (semantics, quality, overall) of an item: the minima of the marks, and the root of their product.

    Raises ValueError if there are no marks, or one is not a finite number of at least 0.
    """
    for name, marks in (("semantics", semantics), ("quality", quality)):
        good = all(
            isinstance(m, int | float) and not isinstance(m, bool) and math.isfinite(m) and m >= 0 for m in marks
        )
        if not marks or not good:
            raise ValueError(f"the judge's marks for {name} are {marks!r}; expected numbers from 0 to 10")
    low = float(min(semantics)), float(min(quality))
    return *low, math.sqrt(low[0] * low[1])
