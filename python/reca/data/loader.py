"""Infinite stream of one task's micro-batches, from any start position, on any number of ranks."""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca.data import dali
from reca.data.bad_samples import BadSamples
from reca.data.batch import Batch, task_rng
from reca.data.cache import FeatureCache, collate, content
from reca.data.config import DataConfig
from reca.data.errors import BadSample, DataError, LeftOut
from reca.data.meter import Meter
from reca.data.micro_batches import MicroBatch, passes_by_tokens, split_batch
from reca.data.order import Mixed, make_order
from reca.data.outage import outlast
from reca.data.sample import Sample, Source, checked_sample, sample_errors
from reca.data.sources.factory import DATA_KEYS, open_sources
from reca.data.sources.mixture import Mixture
from reca.data.tasks import Captions, Scored
from reca.data.templates import load_templates
from reca.data.text import one_line
from reca.data.transforms import PillowDecoder
from reca.data.views import Views
from reca.rng import CounterRNG, RandomStream

ATTEMPTS = 100
Prepare = Callable[[Batch, CounterRNG], Any]  # Adapter.prepare


def open_loader(
    config: DataConfig,
    task: str,
    views: Views,
    *,
    seed: int,
    micro_batch: int,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    neighbours: bool = False,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    bad_samples: Path | None = None,
    identity: Any = None,
    spare: Callable[[Path], int] | None = None,
    source: Source | None = None,
    prepare: Prepare | None = None,
) -> "Loader":
    """Open the loader of one task that a recipe describes. Raises DataError like `open_sources`.

    batch_size: samples per step over all ranks; None: one full micro-batch per rank.
    max_tokens: limit per batch of the tokens that `prepare` counts; replaces micro_batch when a rank's share is split.
    neighbours: set the `neighbour` of every batch.
    start: first position of the stream.
    bad_samples: file that lists bad samples.
    identity: everything besides the images that features in data.cache depend on; None: no cache.
    spare: returns how many bytes of the disk of data.cache to leave free; None: none.
    source: the samples, if they are open already.
    prepare: called with every batch and its random number generator; the result becomes `Batch.prepared`.
    """
    source = source or open_sources(config, [task], seed)[task]
    cache = None
    if config.cache and identity is not None:
        cache = FeatureCache(Path(config.cache), views, [task, identity], spare)
    samples = batch_size or micro_batch * world_size
    shares = split_batch(samples, micro_batch if max_tokens is None else -(-samples // world_size), world_size)[rank]
    stream = Stream(shares, samples, start, neighbours)
    return Loader(config, source, task, views, seed, stream, bad_samples, cache, prepare, max_tokens)


@dataclass(frozen=True)
class Stream:
    """Positions that one rank reads: its micro-batches, step by step."""

    shares: list[MicroBatch]
    batch_size: int
    start: int = 0
    neighbours: bool = False

    def __iter__(self) -> Iterator[tuple[MicroBatch, range, list[int]]]:
        """Yield every micro-batch, its positions, and the position of its neighbour, if requested.

        The neighbour is the next sample after the micro-batch; after the last sample of a step it is the first one.
        So every sample is followed by the same one, however the step is split.
        """
        for base in itertools.count(self.start, self.batch_size):
            for share in self.shares:
                after = share.start + share.size
                neighbour = [base + after % self.batch_size] if self.neighbours else []
                yield share, range(base + share.start, base + after), neighbour


class Row(NamedTuple):
    """A sample that was read: with its views, with cached features, or not decoded yet."""

    sample: Sample
    gen: Tensor | None
    und: Tensor | None
    features: dict[str, Tensor] | None = None
    address: str = ""  # in the cache
    target: Tensor | None = None  # generation view of another image to stay close to
    encoded: bool = False  # not decoded yet: that is done together with its batch
    number: int = -1  # index in the source
    attempt: int = 0  # number of samples tried before it at its position


class Loader:
    """Iterable of `Batch`: the micro-batches of this rank.

    Position p of the stream is the same sample, with id p, however the stream is split: step u of N samples covers
    positions u N to u N + N - 1, and reca/micro_batches.py assigns them to ranks. An unreadable sample is replaced by a
    substitute that depends on the position only, so batches stay full and every other sample of the epoch is still
    delivered.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        task: str,
        views: Views,
        seed: int,
        stream: Stream,
        bad_samples: Path | None = None,
        cache: FeatureCache | None = None,
        prepare: Prepare | None = None,
        max_tokens: int | None = None,
    ):
        self.config, self.source, self.task, self.stream = config, source, task, stream
        self.views = views
        self.rng = task_rng(seed, task)
        self.order = make_order(source, task_rng(seed, task, 1).seed, config.shuffle)
        self.decode = _decoder(config, views, self.rng)
        self.batched = self.decode if isinstance(self.decode, dali.DaliDecoder) else None
        self.templates = load_templates(config.templates, config.template_count) if task == "reca" else None
        self.cache, self.prepare, self.max_tokens = cache, prepare, max_tokens
        self.meter = Meter()
        self.bad_samples = BadSamples(bad_samples, source, config.max_bad_fraction)
        self.pool = ThreadPoolExecutor(config.workers) if config.workers else None
        self.closed = threading.Event()

    @property
    def labels(self) -> list[str]:
        """Return short names of a mixture's sources, for the log; [] for a single source."""
        return self.source.labels if isinstance(self.source, Mixture) else []

    @property
    def bad(self) -> int:
        """Return the number of distinct bad samples that all ranks have found so far."""
        return self.bad_samples.count()

    def __iter__(self) -> Iterator[Batch]:
        return itertools.chain.from_iterable(self._batches())

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the list of this rank's micro-batches, step by step."""
        batches = self._batches()
        while True:
            yield [batch for _ in self.stream.shares for batch in next(batches)]

    def _batches(self) -> Iterator[list[Batch]]:
        """Yield the batches of every share: one, or with max_tokens as many as its samples need.

        A step takes all its shares at once, so as many are read ahead while it computes.
        """
        stream = iter(self.stream)
        ahead: deque[Future] = deque()
        most = max(self.config.prefetch, len(self.stream.shares)) if self.pool and self.config.prefetch else 0
        while True:
            while len(ahead) <= most:
                share, positions, neighbour = next(stream)
                failed: list[Exception] = []
                jobs = [self._submit(self._read_unless, failed, place) for place in (*positions, *neighbour)]
                # The pool starts jobs in this order, so `_assemble` never waits for a job that is still queued.
                ahead.append(self._submit(self._assemble, share, positions, neighbour, jobs))
            yield ahead.popleft().result()

    def sample(self, position: int) -> Batch:
        """Return the batch of one sample, read in the calling thread."""
        return self.named_sample(position)[1]

    def named_sample(self, position: int) -> tuple[str, Batch]:
        """Return the key and the batch of one sample, read in the calling thread."""
        (row,) = self._decoded([position], [self._read(position)])
        return row.sample.key, self._batch([position], [row])

    def row_of(self, index: int) -> Row:
        """Read one sample by its index in the source, with its features if they are cached.

        Raises BadSample and DataError.
        """
        return self._row(index, index, cached=True, alone=True)

    def batch_of(self, rows: list[Row]) -> Batch:
        """Return a batch of rows that have views."""
        return self._batch(range(len(rows)), rows)

    def images_per_s(self) -> float:
        """Return the rate at which the loader's threads could deliver images without waiting, since the last call."""
        return self.meter.rate() * max(1, self.config.workers)

    def close(self) -> None:
        self.closed.set()
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        if self.cache:
            self.cache.flush()

    def _submit(self, function: Callable, *arguments: Any) -> Future:
        if self.pool:
            return self.pool.submit(function, *arguments)
        done: Future = Future()
        done.set_result(function(*arguments))
        return done

    def _assemble(self, share: MicroBatch, positions: range, neighbour: list[int], jobs: list[Future]) -> list[Batch]:
        """Build the batches of a share from its rows, and prepare them for the loss."""
        rows, every = [job.result() for job in jobs], [*positions, *neighbour]
        sizes, made = [share.size], []
        if self.max_tokens is not None:
            assert self.prepare is not None, "max_tokens needs prepare, which counts tokens"
            rows[: share.size] = self._completed(positions, rows[: share.size])
            prepared = self.prepare(self._batch(positions, rows[: share.size]), self.rng)
            sizes = passes_by_tokens(prepared.tokens, self.max_tokens, prepared.packed)
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            mine = slice(end - size, end)
            batch = self._batch(every[mine], rows[mine])
            if isinstance(self.order, Mixed):
                batch.sources = [self.order.place(position)[0] for position in every[mine]]
            if neighbour:
                batch.neighbour = self._batch(every[end : end + 1], rows[end : end + 1])
            batch.counted = share.counted
            if self.prepare:
                batch.prepared = self.prepare(batch, self.rng)
            made.append(batch)
        return made

    def _read_unless(self, failed: list[Exception], position: int) -> Row:
        """Read the sample of a position. After the first error of a batch its other reads end with the same one."""
        if failed:
            raise failed[0]
        try:
            return self._read(position)
        except Exception as error:
            failed.append(error)
            raise

    def _read(self, position: int, cached: bool = True) -> Row:
        """Read the sample of a position, or its substitute. cached: use cached features in place of views."""
        with self.meter:
            return self._read_or_substitute(position, cached)

    def _read_or_substitute(self, position: int, cached: bool, first: int = 0, alone: bool = False) -> Row:
        """Read the sample of a position, or its substitute.

        first: number of the first attempt; attempt 0 is the sample itself.
        alone: decode it now, not together with its batch.
        """
        for attempt in range(first, ATTEMPTS):
            index = self.order.substitute(position, attempt) if attempt else self.order.index(position)
            try:
                row = self._row(index, position, cached, alone)
            except LeftOut:
                continue
            except BadSample as error:
                self.bad_samples.add(index, str(error))
            else:
                if not row.encoded:
                    self.bad_samples.mark_good(index)
                return row._replace(number=index, attempt=attempt)
        key = self.source.key(self.order.substitute(position, ATTEMPTS - 1))
        reason = self.bad_samples.bad.get(key, "a row without an image: leave such rows out of the table")
        last = one_line(f"{key} ({reason})")
        raise DataError(f"position {position}: {ATTEMPTS} samples in a row cannot be used, the last is {last}")

    def _decoded(self, positions: Sequence[int], rows: list[Row]) -> list[Row]:
        """Decode the remaining rows as one batch. A bad image is replaced like an unreadable sample."""
        waiting = [place for place, row in enumerate(rows) if row.encoded]
        if self.batched is None or not waiting:
            return rows
        rows = list(rows)
        with self.meter.more_time(max(1, self.config.workers)):  # batches are decoded one at a time
            found = self.batched.batch([rows[i].sample.image for i in waiting], [positions[i] for i in waiting])
        for place, views in zip(waiting, found, strict=True):
            row = rows[place]
            if isinstance(views, BadSample):
                self.bad_samples.add(row.number, str(views))
                rows[place] = self._read_or_substitute(positions[place], False, row.attempt + 1, alone=True)
            else:
                self.bad_samples.mark_good(row.number)
                rows[place] = row._replace(gen=views[0], und=views[1], encoded=False)
        return rows

    def _row(self, index: int, position: int, cached: bool, alone: bool = False) -> Row:
        """Read one sample. Raises BadSample if it is bad, and DataError with its key for any other error.

        alone: decode it here; otherwise a batched decoder may leave that to `_decoded`.
        """
        with sample_errors(self.source, index, f" (data.{DATA_KEYS[self.task]})"):
            sample = checked_sample(outlast(lambda: self.source[index], self.closed))
            other = sample.text.target if isinstance(sample.text, Scored) else None
            address = content(sample.image + (other or b"")) if self.cache else ""
            if self.cache and cached and (features := self.cache.get(address)):
                return Row(sample, None, None, features, address)
            if self.batched and not alone and other is None and self.batched.takes(sample.image):
                return Row(sample, None, None, address=address, encoded=True)
            gen, und = self.decode(sample.image, position)
            target = None if other is None else self.decode(other, position)[0]
            if target is not None and gen is not None and target.shape != gen.shape:
                raise BadSample(f"image and target differ in shape: {[*gen.shape[1:]]} and {[*target.shape[1:]]}")
            return Row(sample, gen, und, address=address, target=target)

    def _completed(self, positions: Sequence[int], rows: list[Row]) -> list[Row]:
        """Return rows that either all have views or all have the same features."""
        if not _have_features(rows):  # a batch with any new sample is encoded as a whole
            rows = [
                self._read(position, cached=False) if row.features else row
                for position, row in zip(positions, rows, strict=True)
            ]
        return self._decoded(positions, rows)

    def _batch(self, positions: Sequence[int], rows: list[Row]) -> Batch:
        rows = self._completed(positions, rows)
        ids = torch.tensor(list(positions))
        text = [row.sample.text for row in rows]
        if self.templates:
            text = self._drawn(ids, [self.templates] * len(rows))
        if any(isinstance(said, Captions) for said in text):
            text = self._drawn(ids, [said if isinstance(said, Captions) else (said,) for said in text])
        if self.task == "srum":
            text = [said._replace(target=None) for said in text]
        if _have_features(rows):
            return Batch(self.task, ids, text, features=collate([row.features for row in rows if row.features]))
        views = ([getattr(row, view) for row in rows] for view in ("gen", "und"))
        gen, und = (None if view[0] is None else self._placed(view) for view in views)
        on_encoded = functools.partial(self.cache.put, [row.address for row in rows]) if self.cache else None
        target = None
        if any(row.target is not None for row in rows):
            near = (row.gen if row.target is None else row.target for row in rows)
            target = self._placed([view for view in near if view is not None])
        return Batch(self.task, ids, text, gen, und, on_encoded=on_encoded, target=target)

    def _drawn(self, ids: Tensor, texts: Sequence[Sequence[str]]) -> list[str]:
        """Draw one of the texts of every sample, by its id."""
        draws = self.rng.uniform(RandomStream.TEMPLATE, ids)[:, 0] * torch.tensor([len(some) for some in texts])
        return [some[place] for some, place in zip(texts, draws.long().tolist(), strict=True)]

    def _placed(self, views: list[Tensor]) -> list[Tensor]:
        """Move the views of a batch to one device."""
        return self.batched.moved(views) if self.batched else views


def _have_features(rows: list[Row]) -> bool:
    return all(row.features for row in rows) and len({frozenset(row.features or ()) for row in rows}) == 1


def chosen_decoder(config: DataConfig) -> str:
    """Return "pillow" or "dali". Raises DataError if data.decoder names one that is not installed."""
    if config.decoder == "auto":
        return "dali" if torch.cuda.is_available() and dali.available() else "pillow"
    if config.decoder == "dali" and not dali.available():
        raise DataError("data.decoder=dali, but DALI is not installed: pip install 'reca[dali]', or use pillow")
    return config.decoder


def _decoder(config: DataConfig, views: Views, rng: CounterRNG) -> PillowDecoder | dali.DaliDecoder:
    if chosen_decoder(config) == "pillow":
        return PillowDecoder(views, rng)
    return dali.DaliDecoder(views, rng, max(1, config.workers))
