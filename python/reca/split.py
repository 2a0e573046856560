"""Who computes what of an update: its samples over ranks and passes, for any number of either."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Share(NamedTuple):
    """What one rank computes in one pass, a forward and a backward: a micro-batch of the update's samples."""

    start: int  # number of its first sample in the update
    size: int  # samples
    counted: bool = True  # False: a copy of another rank's micro-batch, run for the collectives and counted there only


def split(batch_size: int, micro_batch: int, ranks: int) -> list[list[Share]]:
    """Plan the passes of every rank, by rank and pass.

    All ranks make as many passes, because FSDP2 communicates in each. Of P passes on R ranks, micro-batch p R + r is
    that of rank r in pass p. Sizes differ by one at most, are micro_batch at most, and larger ones come first, so that
    an update takes as long as its ceil(batch_size / R) samples on one rank. Where the samples are fewer than the
    micro-batches, each has one sample or a copy of one.

    Raises ValueError for a number below 1.
    """
    if min(batch_size, micro_batch, ranks) < 1:
        raise ValueError(
            f"batch_size, micro_batch and ranks must be at least 1, got {batch_size}, {micro_batch} and {ranks}"
        )
    count = ranks * -(-batch_size // (micro_batch * ranks))
    size, larger = divmod(batch_size, count)

    def share(i: int) -> Share:
        if i >= batch_size:
            return Share(i % batch_size, 1, counted=False)
        return Share(i * size + min(i, larger), size + (i < larger))

    return [[share(i) for i in range(rank, count, ranks)] for rank in range(ranks)]


def passes(config: Any, ranks: int) -> int:
    """Count the forward passes of a kind on each rank in one update. config: its TaskConfig."""
    return len(split(config.batch_size, config.micro_batch, ranks)[0])


def sizes(batch_size: int, micro_batch: int, ranks: int) -> list[int]:
    """List the different sizes of the micro-batches, largest first. Copies are none."""
    shares = split(batch_size, micro_batch, ranks)
    return sorted({share.size for rank in shares for share in rank if share.counted}, reverse=True)


def describe(batch_size: int, micro_batch: int, ranks: int) -> str:
    """Describe passes, samples of a rank and of a micro-batch."""
    shares = split(batch_size, micro_batch, ranks)
    own = [sum(share.size for share in rank if share.counted) for rank in shares]
    count = len(shares[0])
    samples = str(own[0]) if len(set(own)) == 1 else f"{min(own)} to {max(own)}"
    each = " or ".join(map(str, sizes(batch_size, micro_batch, ranks)))
    return f"{samples} per GPU, {count} pass{'es' * (count > 1)} of {each}"


def departures(objective: Any, tasks: Iterable[str], ranks: int) -> str | None:
    """Say what `ranks` change about the update that the recipe describes; None if nothing.

    objective: an ObjectiveConfig. A mean over the update does not depend on micro-batches.
    """
    others = []
    for task in tasks if objective.mean == "micro_batch" else ():
        config = getattr(objective, task)
        made = sizes(config.batch_size, config.micro_batch, ranks)
        if made != [config.micro_batch]:
            others.append(f"{task} {' or '.join(map(str, made))} instead of {config.micro_batch}")
    if not others:
        return None
    return (
        f"the samples of the micro-batches on {ranks} GPU{'s' * (ranks > 1)} are not the recipe's: "
        f"{'; '.join(others)}. "
        "objective.mean=micro_batch averages each by itself and weights it by its share of the samples, so the update "
        "changes a little where samples carry different numbers of tokens; objective.mean=update averages over all"
    )
