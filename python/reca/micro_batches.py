"""The samples of a step, split into micro-batches over ranks and gradient accumulation steps."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from reca import units


class MicroBatch(NamedTuple):
    """Samples that one rank runs forward and backward at once."""

    start: int  # its first sample, counted from the first of the step
    size: int  # number of samples
    counted: bool = True  # False: a copy of another rank's micro-batch, run for FSDP2's collectives and counted there


def split_batch(batch_size: int, micro_batch: int, ranks: int) -> list[list[MicroBatch]]:
    """Split a step into micro-batches: a list for every rank, with one entry an accumulation step.

    All ranks make the same number of steps, because FSDP2 communicates in each. On R ranks, micro-batch p R + r is that
    of rank r in step p. Sizes differ by at most one, are at most `micro_batch`, and larger ones come first, so that an
    step takes as long as ceil(batch_size / R) samples on one rank. With fewer samples than micro-batches, each has
    one sample or a copy of one.

    Raises ValueError for a number below 1.
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
    """Split a task's step as `split_batch`: with max_tokens into all samples of a rank. config: its TaskConfig."""
    most = config.micro_batch if config.max_tokens is None else -(-config.batch_size // ranks)
    return split_batch(config.batch_size, most, ranks)


def passes_by_tokens(tokens: Sequence[int], most: int, packed: bool) -> list[int]:
    """Split a rank's samples, in their order, into passes of at most `most` tokens, and return how many each has.

    tokens: of each sample. packed: they stand behind each other; else a pass is as long as its longest, times samples.
    A sample of more than `most` is a pass by itself.
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
    """Count the micro-batches of one task on each rank in one step; with max_tokens 1, the least. config: a TaskConfig.

    How many they are with max_tokens the lengths of the samples decide.
    """
    return len(shares_of(config, ranks)[0])


def micro_batch_sizes(batch_size: int, micro_batch: int, ranks: int) -> list[int]:
    """List the distinct sizes of the micro-batches, largest first. Copies do not count."""
    split = split_batch(batch_size, micro_batch, ranks)
    return sorted({one.size for rank in split for one in rank if one.counted}, reverse=True)


def describe_split(config: Any, ranks: int) -> str:
    """Describe the samples of a rank, its passes, and the sizes of micro-batches. config: a TaskConfig."""
    split = shares_of(config, ranks)
    own = [sum(one.size for one in rank if one.counted) for rank in split]
    count = len(split[0])
    samples = str(own[0]) if len(set(own)) == 1 else f"{min(own)} to {max(own)}"
    if config.max_tokens is not None:
        return f"{samples} per GPU, passes of up to {config.max_tokens} tokens"
    each = " or ".join(map(str, micro_batch_sizes(config.batch_size, config.micro_batch, ranks)))
    return f"{samples} per GPU, {count} pass{'es' * (count > 1)} of {each}"


def size_warning(objective: Any, tasks: Iterable[str], ranks: int) -> str | None:
    """Describe how the step on `ranks` GPUs differs from the recipe's; None if it does not.

    objective: an ObjectiveConfig. A mean over the step does not depend on micro-batches.
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
        f"the samples of the micro-batches on {units.counted(ranks, 'GPU')} are not the recipe's: "
        f"{'; '.join(differing)}. "
        "objective.mean=micro_batch averages each by itself and weights it by its share of the samples, so the step "
        "changes a little where samples carry different numbers of tokens; objective.mean=batch averages over all"
    )
