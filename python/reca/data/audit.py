"""Audit of a source: reads and decodes every sample, and reports bad ones, sizes, duplicates and texts."""

import functools
import hashlib
import itertools
import statistics
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reca import units
from reca.data.errors import BadSample, LeftOut
from reca.data.outage import outlast
from reca.data.pixels import open_rgb
from reca.data.read_ahead import read_ahead
from reca.data.sample import Source, checked_sample, sample_errors
from reca.data.sources.skipped import Skipped
from reca.data.tasks import Captions, Scored, Turn
from reca.data.text import one_line

SIDES = (128, 256, 512, 768, 1024, 2048)  # edges of the histogram of short sides, in pixels
RATIOS = (1.1, 1.5, 2.0, 4.0)  # edges of the histogram of long side over short side
SHOWN = 10  # most bad samples, reasons and duplicates that are listed


class Inspection(NamedTuple):
    """Result of reading one sample."""

    key: str
    bad: str | None = None
    left_out: str | None = None
    bytes: int = 0
    width: int = 0
    height: int = 0
    digest: int = 0  # of the image file
    text: Any = None


@dataclass
class Audit:
    """Counts over the samples of a source.

    bad: key -> reason. left_out: rows that are not samples. duplicates: key -> key of the first identical image.
    """

    samples: int = 0
    bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    left_out: Skipped = field(default_factory=Skipped)
    sides: Counter[int] = field(default_factory=Counter)
    ratios: Counter[int] = field(default_factory=Counter)
    duplicates: dict[str, str] = field(default_factory=dict)
    captions: list[int] = field(default_factory=list)  # words per caption
    turns: list[int] = field(default_factory=list)  # turns per conversation
    answers: list[int] = field(default_factory=list)  # words per answer
    texts: Counter[int] = field(default_factory=Counter)  # hash of a caption -> count
    first: dict[int, str] = field(default_factory=dict)  # digest -> key

    def add(self, looked: Inspection, about: bool) -> None:
        """Count one sample. about: texts are about images, so a repeated image is not a duplicate."""
        if looked.left_out:
            self.left_out.add(looked.left_out, looked.key)
            return
        self.samples += 1
        if looked.bad:
            self.bad[looked.key] = looked.bad
            return
        self.bytes += looked.bytes
        short, long = sorted((looked.width, looked.height))
        self.sides[sum(short >= side for side in SIDES)] += 1
        self.ratios[sum(long > short * ratio for ratio in RATIOS)] += 1
        first = self.first.setdefault(looked.digest, looked.key)
        if not about and first != looked.key:
            self.duplicates[looked.key] = first
        said = looked.text.caption if isinstance(looked.text, Scored) else looked.text
        if isinstance(said, str | Captions):
            for caption in (said,) if isinstance(said, str) else said:
                self.captions.append(len(caption.split()))
                self.texts[hash(caption)] += 1
        elif looked.text:
            self.turns.append(len(looked.text))
            self.answers += [len(Turn(*turn).answer.split()) for turn in looked.text]


def inspect_sample(source: Source, closed: threading.Event, index: int) -> Inspection:
    """Read and decode one sample. closed: ends the waiting for remote storage. Raises DataError."""
    key = source.key(index)
    try:
        with sample_errors(source, index):
            sample = checked_sample(outlast(lambda: source[index], closed))
            image = open_rgb(sample.image)
            if isinstance(sample.text, Scored) and sample.text.target is not None:
                open_rgb(sample.text.target)
    except LeftOut as error:
        return Inspection(key, left_out=str(error))
    except BadSample as error:
        return Inspection(key, bad=str(error))
    digest = int.from_bytes(hashlib.sha256(sample.image).digest()[:8], "little")
    return Inspection(key, None, None, len(sample.image), *image.size, digest, sample.text)


def audit(source: Source, about: bool = False, workers: int = 4, progress: Any = None) -> Audit:
    """Inspect every sample of a source. about: as for `Audit.add`. progress: called after every sample."""
    found, closed = Audit(), threading.Event()
    inspect = functools.partial(inspect_sample, source, closed)
    for looked in read_ahead(inspect, range(len(source)), workers, closed):
        found.add(looked, about)
        if progress:
            progress()
    return found


def report(found: Audit, skipped: Skipped | None = None) -> str:
    """Return an audit as text. skipped: files and rows that the source skipped when it was opened."""
    good = found.sides.total()
    lines = [f"{found.samples} samples, {good} of them usable, {units.size(found.bytes)} of images"]
    for what in (skipped, found.left_out):
        if what:
            counted = (f"  {n:>9} {reason} (the first: {what.first[reason]})" for reason, n in what.counts.items())
            lines += ["", "left out", *counted]
    if found.bad:
        reasons = Counter(found.bad.values()).most_common()
        lines += ["", f"bad samples ({len(found.bad)})", *_some([f"{n:>9} {reason}" for reason, n in reasons])]
        lines += _some([f"{key}: {reason}" for key, reason in found.bad.items()])
    if good:
        lines += ["", "short side in pixels", *_histogram(found.sides, SIDES, good)]
        lines += ["", "long side over short side", *_histogram(found.ratios, RATIOS, good)]
    lines += ["", f"byte-identical duplicates ({len(found.duplicates)})"]
    lines += _some([f"{key} = {first}" for key, first in found.duplicates.items()])
    if found.captions:
        again = sum(n - 1 for n in found.texts.values())
        lines += ["", f"captions: words {_spread(found.captions)}; {again} are the text of another"]
    if found.turns:
        lines += ["", f"conversations: turns {_spread(found.turns)}; words of an answer {_spread(found.answers)}"]
    return "\n".join(lines)


def _some(items: list[str]) -> list[str]:
    more = [f"  … and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [f"  {one_line(item)}" for item in items[:SHOWN]] + more


def _histogram(counts: Counter[int], edges: tuple, total: int) -> list[str]:
    names = [f"below {edges[0]}"]
    names += [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    names.append(f"{edges[-1]} and more")
    bars = ["#" * round(40 * counts[i] / total) for i in range(len(names))]
    return [f"  {name:<16}{counts[i]:>9}  {bars[i]}".rstrip() for i, name in enumerate(names) if counts[i]]


def _spread(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}, median {statistics.median(numbers):g}"
