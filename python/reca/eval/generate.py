"""Step 1: generate the model's images in the benchmark's folder layout, or its answers.

The seed of an image is a hash of (suite, item, k), so an image does not depend on ranks, batches or order, and two
models start from the same noise. Files are written atomically; an interrupted run continues with the missing ones.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from reca.io.paths import is_file
from reca.models.base import Adapter
from reca.options.names import option

log = logging.getLogger("reca")
CHUNK = 32  # images generated between two writes
SEED_BITS = 56
END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG
ROOM = 1.1  # required free disk space, relative to the estimated size of the remaining images


def image_seed(suite: str, item: str, k: int, seed: int = 0) -> int:
    """Hash (suite, item, k) to the seed of an image. seed: base seed of the evaluation."""
    text = json.dumps([seed, suite, item, k]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[: SEED_BITS // 8], "big")


def weights_hash(model: nn.Module) -> str:
    """Hash all weights: names, dtypes, shapes and bytes."""
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
    """Generate, or edit, the images that are missing in a folder. Under torchrun each rank generates its share.

    alike: the model's weights may be sharded over ranks, so all ranks call it equally often, if necessary for images
    that are discarded, and fail together.
    Returns the number of images that this rank wrote. Raises EvaluationError if the disk is full.
    """
    everything = [(item, k) for item in items for k in range(images_per_item)]
    mine = everything[distributed.rank() :: distributed.world_size()]
    todo = [(item, k) for item, k in mine if not is_complete(images / suite.path(item, k))]
    wanted, made, size = len(todo), 0, 0
    if alike:
        todo += everything[:1] * (max(distributed.all_gather(wanted)) - wanted)
    for chunk in _chunks(todo, f"{suite.name}: images"):
        seeds = [image_seed(suite.name, item.id, k, seed) for item, k in chunk]
        prompts = [item.prompt for item, _ in chunk]
        with inference.fail_together(model) if alike else contextlib.nullcontext():
            if suite.ability == "edit":
                sources = [_source(item) for item, _ in chunk]
                drawn = inference.edit(model, sources, prompts, seeds, **sampling)
            else:
                drawn = inference.generate(model, prompts, seeds, **sampling)
        with distributed.fail_together() if alike else contextlib.nullcontext():
            for (item, k), image in list(zip(chunk, drawn, strict=True))[: wanted - made]:
                _write_companions(suite, item, images)
                data = encode_png(image)
                write(images / suite.path(item, k), data, sync=False, root=images)
                made, size = made + 1, size + len(data)
            check_room(images, (wanted - made) * size // max(made, 1))
    return made


def generate_answers(
    model: Adapter, suite: Suite, items: Sequence[Item], path: Path, *, max_new_tokens: int = 16
) -> int:
    """Let the model answer the remaining questions, and append the answers to a JSON-lines file. Only rank 0 does so.

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
                row = {"item": item.id, "k": k, "digest": item.input_digest, "answer": reply}
                file.append(json.dumps(row, ensure_ascii=False))
    return len(todo)


def method_of(adapter: type[Adapter], suite: Suite) -> Callable[..., Any]:
    """Return the function whose keyword arguments are the sampling options of a model for a suite."""
    return generate_answers if suite.ability == "answer" else getattr(adapter, suite.ability)


def read_answers(path: Path, items: Sequence[Item]) -> dict[Key, str]:
    """Read a model's answers to these items. Answers to an earlier prompt or image of an item are ignored."""
    given = {item.id: item.input_digest for item in items}
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
    if item.source is None or not is_file(item.source):
        raise EvaluationError(f"item {item.id}: its image {item.source} does not exist; check {option('data')}")
    return read_image(item.source)


def is_complete(path: Path) -> bool:
    """Tell whether a PNG is complete. After a power failure a file can be truncated, or end in zeros."""
    try:
        with path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            return file.read() == END
    except OSError:  # includes a file shorter than END
        return False


def _write_companions(suite: Suite, item: Item, images: Path) -> None:
    for name, content in suite.companions(item).items():
        if not is_file(images / name):
            data = content.read_bytes() if isinstance(content, Path) else content
            write(images / name, data, sync=False, root=images)


def check_room(folder: Path, size: int) -> None:
    """Raise EvaluationError unless the disk has space for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size * ROOM > free:
        raise EvaluationError(
            f"{folder}: the remaining images need about {units.size(size)}, but the disk has only {units.size(free)} "
            "left. Finished images are kept: free disk space, then run the same command again to resume"
        )
