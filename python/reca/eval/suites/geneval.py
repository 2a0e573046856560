"""GenEval: short prompts about objects, counts, colours and positions, judged by a detector (djghosh13/geneval)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from reca.eval import files
from reca.eval.errors import EvaluationError
from reca.eval.suites.base import PROMPTS, Item, Key, RowFolders, Score, Value, answered, equal_weights, tag_means
from reca.eval.suites.geneval_rules import TAGS, mistakes, summarize, threshold_of
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file
from reca.options.names import option


class GenEval(RowFolders):
    """The layout of RowFolders, with each prompt's row as <row>/metadata.jsonl."""

    name = "geneval"
    protocol = "GenEval"
    images_per_item = 4
    judge_kind = "detector"
    exact_judge = "Mask2Former swin-s of OpenMMLab with CLIP ViT-L/14: judge mask2former:FILE"
    data_help = "Use prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval (MIT)."
    file = "evaluation_metadata.jsonl"
    shipped: ClassVar[Path | None] = PROMPTS / "geneval" / file

    def items(self) -> list[Item]:
        path = self.data_path()
        path = path / self.file if is_dir(path) else path
        lines = files.read_lines(path, self.data_help)
        return [self._item(number, line, path) for number, line in enumerate(lines) if line.strip()]

    def items_of_images(self, images: Path, partial: bool = False) -> list[Item]:
        """Read the rows next to the images; [] if all of them are in the shipped list, which is then used.

        Other prompts are complete if their ids and tags are those of the shipped list. Otherwise the number of prompts
        is unknown without their file: an interrupted generation has images of the first ones only.
        """
        folders = sorted((p for p in images.iterdir() if is_dir(p) and p.name.isdecimal()), key=lambda p: int(p.name))
        found = [
            self._item(int(folder.name), files.read_text(path, self.data_help), path)
            for folder in folders
            if is_file(path := folder / "metadata.jsonl")
        ]
        known = {item.id: item for item in GenEval().items()}
        if self.shipped and all(known.get(item.id) == item for item in found):
            return []
        whole = {item.id: item.tag for item in found} == {name: item.tag for name, item in known.items()}
        if found and not whole and not partial:
            raise EvaluationError(
                f"{images} contains the rows of {len(found)} prompts that are not the {len(known)} of {self.name}, so "
                f"their total number is unknown. Pass the file of all prompts as {option('data')}, or set "
                f"{option('partial', True)} to score these"
            )
        return found

    def _item(self, number: int, line: str, path: Path) -> Item:
        try:
            row = parse_json(line)
            return Item(f"{number:05d}", row["tag"], row["prompt"], metadata=row)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path}, row {number}, is not a prompt of GenEval ({error!r}). {self.data_help}"
            ) from error

    def companions(self, item: Item) -> dict[str, str | Path]:
        return {f"{item.id}/metadata.jsonl": json.dumps(item.metadata)}

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        """Detect objects, and classify the colours of those for which the rule needs them."""
        colored: dict[str, int] = {}
        for wanted in item.metadata.get("include", ()):
            if "color" in wanted:
                colored[wanted["class"]] = max(colored.get(wanted["class"], 0), wanted["count"])
        return judge.detect(image, colored, threshold_of(item.metadata))

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        """Apply GenEval's rules to detections. Imported verdicts of the public script are used as they are."""
        values, rows = [], []
        for item, key, answer in answered(answers, items):
            if "correct" in answer:
                correct, reason = bool(answer["correct"]), str(answer.get("reason", ""))
            else:
                reason = "\n".join(mistakes(answer, item.metadata))
                correct = not reason
            values.append(Value(*key, item.tag, float(correct), reason))
            rows.append((item.tag, json.dumps(item.metadata), correct))
        metrics: dict[str, Any] = {}
        if rows:
            summary = summarize(rows)
            metrics = {"overall": summary.overall, "images": summary.images, "prompts": summary.prompts}
        present = tag_means(values)
        ordered = [tag for tag in TAGS if tag in present] + [tag for tag in present if tag not in TAGS]
        metrics["tags"] = {tag: present[tag] for tag in ordered}
        return Score(values, equal_weights(ordered), metrics, [])

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read the public script's result file."""
        known = {int(item.id): item for item in items}
        found: dict[Key, Any] = {}
        for number, line in enumerate(files.read_lines(path, errors="replace")):
            try:
                row = parse_json(line)
                file, metadata = Path(row["filename"].replace("\\", "/")), parse_json(row["metadata"])
                item, k, correct = known.get(int(file.parts[-3])), int(file.name.split(".png")[0]), row["correct"]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                continue  # for example, a truncated line
            if item is None or k < 0:  # a prompt that is not evaluated
                continue
            if not isinstance(correct, bool | int) or correct not in (0, 1):
                raise EvaluationError(f"{path}, line {number + 1}: correct is {correct!r}; expected true or false")
            if dict(item.metadata) != metadata:
                raise EvaluationError(
                    f"{path}, line {number + 1}: {row['filename']} has the prompt {row.get('prompt')!r}, but this item "
                    f"has another one here; pass the prompts from which the images were generated as {option('data')}"
                )
            found[item.id, k] = {"correct": bool(correct), "reason": row.get("reason", "")}
        return found or None


class GenEvalLong(GenEval):
    """GenEval with the long prompts of the RECA release. Its scores are not comparable with those of GenEval."""

    name = "geneval_long"
    protocol = "GenEval, long prompts"
    data_help = (
        "Use Benchmark/geneval/evaluation_metadata_long.jsonl of github.com/wishhyt/reconstruction-alignment "
        "(Apache-2.0), which `reca get suite geneval_long` downloads."
    )
    file = "evaluation_metadata_long.jsonl"
    shipped = None
