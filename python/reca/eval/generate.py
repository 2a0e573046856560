"""Step 1: the model's images, in the benchmark's folder layout, or its answers.

The seed of an image is a hash of (suite, item, k), so neither ranks nor batches nor order change an image, and two
models draw from equal noise. Files appear as a whole; a run that was stopped goes on with those that are missing.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reca import distributed, inference, units
from reca.data.pixels import encode_png, read_image
from reca.eval import records
from reca.eval.errors import EvaluationError
from reca.eval.files import write
from reca.eval.suites import Item, Key, Suite
from reca.eval.suites.base import agree
from reca.models.base import Adapter

log = logging.getLogger("reca")
CHUNK = 32  # images that are generated before they are written
SEED_BITS = 56
END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG
ROOM = 1.1  # free space asked for, over what the remaining images will take


def image_seed(suite: str, item: str, k: int, seed: int = 0) -> int:
    """Hash (suite, item, k) into a seed. seed: another one gives another set of images."""
    text = json.dumps([seed, suite, item, k]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[: SEED_BITS // 8], "big")


def weights_hash(model: nn.Module) -> str:
    """Hash all weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def generate_images(
    model: Adapter,
    suite: Suite,
    items: Sequence[Item],
    images: Path,
    images_per_item: int,
    sampling: Mapping[str, Any],
    seed: int = 0,
    alike: bool = False,
) -> int:
    """Generate, or edit, what is missing in a folder. Under torchrun every rank makes its share.

    alike: ranks share the model's weights, too, so all call it equally often, for images that are thrown away if need
    be, and fail together.
    Returns the number of images that this rank made. Raises EvaluationError when the disk does not take them.
    """
    everything = [(item, k) for item in items for k in range(images_per_item)]
    mine = everything[distributed.rank() :: distributed.world_size()]
    todo = [(item, k) for item, k in mine if not is_drawn(images / suite.path(item, k))]
    wanted, made, size = len(todo), 0, 0
    if alike:
        todo += everything[:1] * (max(distributed.all_gather(wanted)) - wanted)
    for chunk in _chunks(todo, f"{suite.name}: images"):
        seeds = [image_seed(suite.name, item.id, k, seed) for item, k in chunk]
        prompts = [item.prompt for item, _ in chunk]
        with inference.together(model) if alike else contextlib.nullcontext():
            if suite.ability == "edit":
                sources = [_source(item) for item, _ in chunk]
                drawn = inference.edit(model, sources, prompts, seeds, **sampling)
            else:
                drawn = inference.generate(model, prompts, seeds, **sampling)
        with distributed.fail_together() if alike else contextlib.nullcontext():
            for (item, k), image in list(zip(chunk, drawn, strict=True))[: wanted - made]:
                _write_companions(suite, item, images)
                data = encode_png(image)
                write(images / suite.path(item, k), data, sync=False)
                made, size = made + 1, size + len(data)
            check_room(images, (wanted - made) * size // max(made, 1))
    return made


def generate_answers(
    model: Adapter, suite: Suite, items: Sequence[Item], path: Path, *, max_new_tokens: int = 16
) -> int:
    """Ask the model what is not answered yet, and append to a JSON-lines file; on rank 0 alone.

    Returns the number of new answers.
    """
    if distributed.rank() != 0:
        return 0
    known = read_answers(path, items)
    todo = [(item, 0) for item in items if (item.id, 0) not in known]
    with records.Appender(path) as file:
        for chunk in _chunks(todo, f"{suite.name}: answers"):
            images = [_source(item) for item, _ in chunk]
            questions = [item.prompt for item, _ in chunk]
            replies = inference.answer(model, images, questions, max_new_tokens=max_new_tokens)
            for (item, k), reply in zip(chunk, replies, strict=True):
                row = {"item": item.id, "k": k, "digest": item.given, "answer": reply}
                file.append(json.dumps(row, ensure_ascii=False))
    return len(todo)


def read_answers(path: Path, items: Sequence[Item]) -> dict[Key, str]:
    """Read the answers of a model to these items, as they are asked now."""
    given = {item.id: item.given for item in items}
    return {
        record.key: record.answer
        for record in records.read(path)
        if record.error is None and record.item in given and agree(record.digest, given[record.item])
    }


def _chunks(todo: list, title: str) -> Iterator[list]:
    with tqdm(total=len(todo), desc=title, unit="", disable=None if distributed.rank() == 0 else True) as bar:
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            yield chunk
            bar.update(len(chunk))


def _source(item: Item) -> Tensor:
    if item.source is None or not item.source.is_file():
        raise EvaluationError(f"item {item.id}: its image {item.source} does not exist; check --data")
    return read_image(item.source)


def is_drawn(path: Path) -> bool:
    """Tell whether an image is there to the end of its PNG. A machine that lost its power leaves less, or zeros."""
    try:
        with path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            return file.read() == END
    except OSError:  # also of a file that is shorter
        return False


def _write_companions(suite: Suite, item: Item, images: Path) -> None:
    for name, content in suite.companions(item).items():
        if not (images / name).is_file():
            write(images / name, content.read_bytes() if isinstance(content, Path) else content, sync=False)


def check_room(folder: Path, size: int) -> None:
    """Raise EvaluationError unless the disk has room for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size * ROOM > free:
        raise EvaluationError(
            f"{folder}: the remaining images will take about {units.size(size)}, and the disk has {units.size(free)} "
            "left. All images so far are kept: make room and give the same command again, which goes on from there"
        )
