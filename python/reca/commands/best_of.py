"""`reca best-of`: keep, of several images per prompt, the one that makes the prompt most likely under the same model.

The score is log p(prompt | image) under the model's own understanding, as in SUDER (arXiv 2506.07963) and GvU (arXiv
2603.06043). The output folder has the format of `data.captions`, ready for supervised fine-tuning.

    OUT/000012.png, 000012.txt    the best image of prompt 12, counted from 0, and the prompt
    OUT/scores.jsonl              per prompt: seeds, scores, and which image is kept
    OUT/best_of.json              settings of generation and scoring
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reca import distributed, inference
from reca.data.errors import DataError
from reca.data.pixels import encode_png
from reca.data.text import decode_text
from reca.io import jsonl
from reca.io.files import parse_json
from reca.io.folders import BEST_OF, ensure_writable, write_atomically
from reca.io.paths import exists
from reca.io.shape import misfit
from reca.models.base import Adapter
from reca.models.common.likelihood import LogLikelihood

QUESTION = "Describe this image."
TOGETHER = 16  # images that are generated before their prompts are recorded
RECORD = {
    "number": int, "image": str, "prompt": str, "kept": int, "seeds": [int], "log_likelihood": [int | float],
    "tokens": int,
}  # fmt: skip
SETTINGS, SCORES, PART = "best_of.json", "scores.jsonl", "scores.rank{}.jsonl"


@dataclass
class Choice:
    """How images are generated and scored.

    count     images per prompt
    seed      of the first image of the first prompt; image k of prompt i has seed + i count + k
    question  question to which the prompt is scored as the answer
    sampling  sampling options
    model     JSON-serialisable description that identifies the weights
    """

    count: int
    seed: int = 0
    question: str = QUESTION
    sampling: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    def seeds(self, number: int) -> list[int]:
        first = self.seed + number * self.count
        return list(range(first, first + self.count))

    def settings(self) -> dict[str, Any]:
        made = {"candidates": self.count, "seed": self.seed, "question": self.question, "sampling": self.sampling}
        return json.loads(json.dumps(made | {"model": self.model}, default=str))


def read_prompts(path: Path) -> list[str]:
    """Read prompts, one per line, skipping empty lines. Raises DataError for a file without any."""
    try:
        lines = decode_text(path.read_bytes()).split("\n")
    except OSError as error:
        raise DataError(
            f"prompts {path} cannot be read ({error.strerror or error}); give a text file with one prompt per line"
        ) from error
    except ValueError as error:
        raise DataError(f"prompts {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"prompts {path} contains no prompt; write one per line")
    return prompts


def open_folder(out: Path, choice: Choice, prompts: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Check a new folder or one that the same command left, and return the records of finished prompts by number.

    Raises ValueError if the folder was made with other settings or prompts.
    """
    with distributed.fail_together():
        if distributed.rank() == 0:
            ensure_writable(out, "--out", BEST_OF)
    done: dict[int, dict[str, Any]] = {}
    with distributed.fail_together():
        if not exists(out / SETTINGS):
            return done
        _reject_other_settings(out, choice)
        for record in _records(out):
            number = record["number"]
            if number >= len(prompts) or record["prompt"] != prompts[number]:
                raise ValueError(
                    f"--out {out} was made from other prompts: number {number} was {record['prompt']!r:.100}. Append "
                    "new prompts at the end, or give another folder"
                )
            if exists(out / record["image"]) and exists((out / record["image"]).with_suffix(".txt")):
                done[number] = record
    return done


def record_settings(out: Path, choice: Choice) -> None:
    """Write the settings of a new folder. Raises ValueError if the folder was made with other settings."""
    with distributed.fail_together():
        if distributed.rank() == 0 and not exists(out / SETTINGS):
            write_atomically(out / SETTINGS, json.dumps(choice.settings(), indent=1) + "\n")
    with distributed.fail_together():
        _reject_other_settings(out, choice)


def _reject_other_settings(out: Path, choice: Choice) -> None:
    wanted = choice.settings()
    try:
        found = dict(parse_json((out / SETTINGS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{out / SETTINGS} cannot be read ({error}); remove it, or give another --out") from error
    changed = sorted(name for name in wanted if found.get(name) != wanted[name])
    if changed:
        differences = "; ".join(f"{name} was {found.get(name)!r:.200} and is {wanted[name]!r:.200}" for name in changed)
        raise ValueError(
            f"--out {out} was made with other settings: {differences}. Give another folder, or the same settings"
        )


def choose(load: Callable[[], Adapter], prompts: Sequence[str], choice: Choice, out: Path) -> list[dict[str, Any]]:
    """Generate, score and select images for this rank's share of the unfinished prompts.

    load: builds the model and updates choice.model, because a run may have saved another checkpoint since; called on
    every rank, or on none if all prompts are finished.
    An image depends on its prompt and seed only, so the number of ranks and interruptions do not change the result.
    Returns the records of all prompts. Raises OSError if they cannot be written.
    """
    done = open_folder(out, choice, prompts)
    missing = [number for number in range(len(prompts)) if number not in done]
    own = missing[distributed.rank() :: distributed.world_size()]
    several = max(1, TOGETHER // choice.count)
    with distributed.fail_together():
        model = load() if missing else None  # on every rank: they read a checkpoint together
    if missing:
        record_settings(out, choice)
    record = jsonl.JsonLines(out / PART.format(distributed.rank()))
    with tqdm(total=len(own), unit="prompt", disable=None if distributed.rank() == 0 else True) as bar:
        for start in range(0, len(own), several):
            assert model is not None
            for made in _choose(model, own[start : start + several], prompts, choice, out):
                record.write(made)
                if record.lost:
                    raise OSError(f"{record.path} cannot be written; free disk space and repeat the command to go on")
                bar.update()
    record.close()
    distributed.barrier()
    if distributed.rank() == 0:
        merge(out)
    distributed.barrier()
    return jsonl.read(out / SCORES)


def _choose(
    model: Adapter, numbers: Sequence[int], prompts: Sequence[str], choice: Choice, out: Path
) -> Iterable[dict[str, Any]]:
    """Generate, score and write the images of a few prompts. Yields the record of each after its files are written.

    Raises ValueError if the question is so long that the prompt is truncated away.
    """
    texts = [prompts[number] for number in numbers for _ in range(choice.count)]
    seeds = [seed for number in numbers for seed in choice.seeds(number)]
    images = inference.generate(model, texts, seeds, **choice.sampling)
    scores = model.log_likelihood(images, [choice.question] * len(texts), texts)
    for place, number in enumerate(numbers):
        mine = slice(place * choice.count, (place + 1) * choice.count)
        if not all(score.tokens for score in scores[mine]):
            raise ValueError(
                f"--question {choice.question!r:.200} takes up the model's maximum sequence length, so no token of the "
                f"prompt {prompts[number]!r:.100} is scored; give a shorter question"
            )
        sums = [score.sum for score in scores[mine]]
        kept = max(range(choice.count), key=lambda k: sums[k] if math.isfinite(sums[k]) else -math.inf)
        name = f"{number:06d}.png"
        write_atomically(out / name, encode_png(images[mine][kept]), sync=False)
        write_atomically((out / name).with_suffix(".txt"), prompts[number] + "\n", sync=False)
        yield {
            "number": number, "image": name, "prompt": prompts[number], "kept": kept, "seeds": seeds[mine],
            "log_likelihood": sums, "tokens": scores[mine][kept].tokens,
        }  # fmt: skip


def merge(out: Path) -> None:
    """Merge the records of all ranks into one file, ordered by number."""
    records = {record["number"]: record for record in _records(out)}
    write_atomically(out / SCORES, "".join(json.dumps(records[number]) + "\n" for number in sorted(records)))
    for part in out.glob(PART.format("*")):
        part.unlink()


def _records(out: Path) -> list[dict[str, Any]]:
    """Read the records of all files. Those that are incomplete are left out, so that their prompts are repeated."""
    files = [out / SCORES, *sorted(out.glob(PART.format("*")))]
    return [record for file in files for record in jsonl.read(file) if _is_record(record)]


def _is_record(found: dict[str, Any]) -> bool:
    return misfit(found, RECORD) is None and found["number"] >= 0 and 0 <= found["kept"] < len(found["log_likelihood"])


def report(records: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """Report the mean score of the kept images, in nats per token, and that of all generated images."""
    per_token = [[LogLikelihood(s, record["tokens"]).mean for s in record["log_likelihood"]] for record in records]
    kept = [scores[record["kept"]] for scores, record in zip(per_token, records, strict=True)]
    drawn = [score for scores in per_token for score in scores]
    return [
        f"kept {len(records)} of {len(drawn)} images in {out}: mean log p(prompt | image) per token "
        f"{sum(kept) / len(kept):.3f}, of all generated {sum(drawn) / len(drawn):.3f}",
        f"Train on them with: data.captions={out} objective.t2i.weight=1 objective.reca.weight=0",
    ]
