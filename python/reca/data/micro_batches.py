"""Split of a step's samples into micro-batches over ranks and gradient accumulation steps."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from reca import units


class MicroBatch(NamedTuple):
    """Samples of one forward and backward pass of one rank."""

    start: int  # index of its first sample within the step
    size: int  # number of samples
    counted: bool = True  # False: a copy of another micro-batch, run only to match FSDP2's collectives


def split_batch(batch_size: int, micro_batch: int, ranks: int) -> list[list[MicroBatch]]:
    """Split a step into micro-batches: a list for every rank, with one entry per accumulation step.

    All ranks run the same number of accumulation steps, because FSDP2 communicates in each. On R ranks, micro-batch
    p R + r is run by rank r in accumulation step p. Sizes are at most `micro_batch` and differ by at most one, larger
    ones first, so no rank has more than ceil(batch_size / R) samples. If there are fewer samples than micro-batches,
    each has one sample or a copy of one.

    Raises ValueError if an argument is below 1.
    """
    if min(batch_size, micro_batch, ranks) < 1:
        raise ValueError(
            f"batch_size, micro_batch and ranks must be at least 1, got {batch_size}, {micro_batch} and {ranks}"
        )
    count = ranks * -(-batch_size // (micro_batch * ranks))
    size, larger = divmod(batch_size, count)

    def nth(i: int) -> MicroBatch:
        if i >= batch_size:
            return MicroBatch(i % batch_size, 1, counted=False)
        return MicroBatch(i * size + min(i, larger), size + (i < larger))

    return [[nth(i) for i in range(rank, count, ranks)] for rank in range(ranks)]


def shares_of(config: Any, ranks: int) -> list[list[MicroBatch]]:
    """Split a task's step as `split_batch`; with max_tokens, each rank has a single entry. config: a TaskConfig."""
    most = config.micro_batch if config.max_tokens is None else -(-config.batch_size // ranks)
    return split_batch(config.batch_size, most, ranks)


def passes_by_tokens(tokens: Sequence[int], most: int, packed: bool) -> list[int]:
    """Split a rank's samples, in order, into passes of at most `most` tokens. Return the number of samples of each.

    tokens: length of each sample. packed: samples are concatenated; otherwise they are padded to the longest, and
    padding counts. A sample of more than `most` tokens has a pass of its own.
    """
    sizes, whole, longest = [0], 0, 0
    for own in tokens:
        whole, longest = whole + own, max(longest, own)
        if sizes[-1] and (whole if packed else longest * (sizes[-1] + 1)) > most:
            sizes.append(0)
            whole = longest = own
        sizes[-1] += 1
    return sizes


def accumulation_steps(config: Any, ranks: int) -> int:
    """Count the micro-batches of one task on each rank in one step. config: a TaskConfig.

    With max_tokens the number depends on the lengths of the samples; 1, the minimum, is returned.
    """
    return len(shares_of(config, ranks)[0])


def micro_batch_sizes(batch_size: int, micro_batch: int, ranks: int) -> list[int]:
    """List the distinct sizes of the micro-batches, largest first, without copies."""
    split = split_batch(batch_size, micro_batch, ranks)
    return sorted({one.size for rank in split for one in rank if one.counted}, reverse=True)


def describe_split(config: Any, ranks: int) -> str:
    """Describe the number of samples and passes per rank and the micro-batch sizes. config: a TaskConfig."""
    split = shares_of(config, ranks)
    own = [sum(one.size for one in rank if one.counted) for rank in split]
    count = len(split[0])
    samples = str(own[0]) if len(set(own)) == 1 else f"{min(own)} to {max(own)}"
    if config.max_tokens is not None:
        return f"{samples} per GPU, passes of up to {config.max_tokens} tokens"
    each = " or ".join(map(str, micro_batch_sizes(config.batch_size, config.micro_batch, ranks)))
    return f"{samples} per GPU, {count} pass{'es' * (count > 1)} of {each}"


def size_warning(objective: Any, tasks: Iterable[str], ranks: int) -> str | None:
    """Describe how the micro-batches on `ranks` GPUs differ from the recipe's; None if the loss is not affected.

    objective: an ObjectiveConfig. Only objective.mean=micro_batch depends on the split into micro-batches.
    """
    differing = []
    for task in tasks if objective.mean == "micro_batch" else ():
        config = getattr(objective, task)
        actual = micro_batch_sizes(config.batch_size, config.micro_batch, ranks)
        if actual != [config.micro_batch]:
            differing.append(f"{task} {' or '.join(map(str, actual))} instead of {config.micro_batch}")
    if not differing:
        return None
    return (
        f"micro-batch sizes on {units.counted(ranks, 'GPU')} differ from the recipe's: "
        f"{'; '.join(differing)}. "
        "objective.mean=micro_batch averages micro-batches separately and weights each by its share of the samples, so "
        "the loss changes slightly if samples have different numbers of tokens; objective.mean=batch averages over the "
        "whole step"
    )
