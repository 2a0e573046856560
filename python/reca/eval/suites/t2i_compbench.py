"""T2I-CompBench: prompts about attributes, relations and numbers (Karine-Huang/T2I-CompBench).

Its own judges (BLIP-VQA over spaCy's noun phrases, UniDet, CLIP) are not reimplemented: their result files are read. A
VLM can judge instead, by the probability of yes for the whole prompt, a different score that is labelled as such.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import PROMPTS, Item, Key, Score, Suite, Value, answered, equal_weights, tag_means
from reca.eval.suites.geneval2 import YES
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file

COMBINED = "annotation_3_in_1"  # folder with the result of "complex", an average of the other folders' results
IMAGES = f"*_{'[0-9]' * 6}.png"
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex", "3d_spatial", "numeracy")


class T2ICompBench(Suite):
    """Image layout: <category>/samples/<prompt>_<6 digits>.png. The digits number all images of a category."""

    name = "t2i_compbench"
    protocol = "T2I-CompBench"
    images_per_item = 10
    exact_judge = "BLIP-VQA, UniDet and CLIP of the benchmark's own scripts: judge recorded:FOLDER"
    data_help = (
        "Use the folder examples/dataset of github.com/Karine-Huang/T2I-CompBench (MIT), with color_val.txt and others."
    )
    shipped: ClassVar[Path | None] = PROMPTS / "t2i_compbench"

    def items(self) -> list[Item]:
        root, items = self.data_path(), []
        for category in CATEGORIES:
            path = root / f"{category}_val.txt"
            lines = files.read_lines(path, self.data_help) if is_file(path) else []
            prompts = [line.strip() for line in lines if line.strip()]
            items += [
                Item(f"{category}/{number:04d}", category, prompt.split("\t")[0], metadata={"number": number})
                for number, prompt in enumerate(prompts)
            ]
        if not items:
            raise EvaluationError(f"{root} contains no files of prompts such as color_val.txt. {self.data_help}")
        return items

    def _number(self, item: Item, k: int) -> int:
        return item.metadata["number"] * self.images_per_item + k

    def path(self, item: Item, k: int) -> str:
        return f"{item.tag}/samples/{item.prompt.replace('/', ' ')}_{self._number(item, k):06d}.png"

    def layout(self) -> str:
        return "CATEGORY/samples/PROMPT_000000.png"

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        """Find images by their prompt.

        Digits in an item's own range give the index of the image, and distinguish items with the same prompt. Others,
        from folders with another number of images per item, only order the images of a prompt.
        """
        by_name: dict[tuple[str, str], list[Path]] = {}
        for category in {item.tag for item in items}:
            for path in sorted((images / category / "samples").glob(IMAGES)):
                by_name.setdefault((category, path.stem[:-7]), []).append(path)
        names = [(item.tag, item.prompt.replace("/", " ")) for item in items]
        times, found = Counter(names), dict[Key, Path]()
        for item, name in zip(items, names, strict=True):
            paths, first = by_name.get(name, []), self._number(item, 0)
            own = [path for path in paths if 0 <= _digits(path) - first < self.images_per_item]
            if times[name] > 1 or len(own) == len(paths):
                found |= {(item.id, _digits(path) - first): path for path in own}
            else:
                found |= {(item.id, k): path for k, path in enumerate(paths)}
        return found

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        text = f'Does this picture show "{item.prompt}"? Answer in one word.'
        return judge.first_token_probability(text, [image], list(YES))

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        values, failed = [], []
        for item, key, answer in answered(answers, items):
            try:
                values.append(Value(*key, item.tag, float(answer)))
            except (TypeError, ValueError):
                failed.append((key, f"{str(answer)[:200]!r} is not a number"))
        tags = tag_means(values)
        return Score(values, equal_weights(tags), {"categories": tags}, failed)

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read <category>/**/vqa_result.json: [{"question_id": number of the image, "answer": score}]."""
        if not is_dir(path):
            return None
        found: dict[Key, Any] = {}
        for category in CATEGORIES:
            if (file := _result(path / category)) is None:
                continue
            rows = parse_json(file.read_text(encoding="utf-8"))
            answers = {int(row["question_id"]): float(row["answer"]) for row in rows}
            numbers = self._numbers(path, category, [item for item in items if item.tag == category], set(answers))
            found |= {numbers[number]: answer for number, answer in answers.items() if number in numbers}
        return found or None

    def _numbers(self, path: Path, category: str, items: Sequence[Item], asked: set[int]) -> dict[int, Key]:
        """Map question_id to images, by the images next to the results or, without them, assuming ten per item.

        UniDet writes the digits of the image's name. BLIP and CLIP write its index among all images, which differs if
        not every item has ten images.
        """
        images = sorted((path / category / "samples").glob(IMAGES), key=_digits)
        if not images:
            return {self._number(item, k): (item.id, k) for item in items for k in range(self.images_per_item)}
        keys = {image: key for key, image in self.find(path, items).items()}
        by_place = asked == set(range(len(images)))
        numbers = enumerate(images) if by_place else ((_digits(image), image) for image in images)
        return {number: keys[image] for number, image in numbers if image in keys}


def _digits(image: Path) -> int:
    return int(image.stem[-6:])


def _result(folder: Path) -> Path | None:
    """Find the result file of a category; None if there is none.

    Files in VQA/result are about single noun phrases and ignored.
    Raises EvaluationError if the result file is ambiguous.
    """
    there = [file for file in sorted(folder.rglob("vqa_result.json")) if file.parent.name != "result"]
    wanted = [file for file in there if file.parent.name == COMBINED] if folder.name == "complex" else there
    if there and len(wanted) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in there)
        expected = f"one in {COMBINED}, which 3_in_1.py writes" if folder.name == "complex" else "one"
        raise EvaluationError(f"{folder} contains {found}; expected {expected}. Keep only the one to be read")
    return wanted[0] if there else None
