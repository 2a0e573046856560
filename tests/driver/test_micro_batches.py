"""Splits of a step: every sample once, equal work, as many passes on every rank."""

import itertools
import math

import pytest
import torch

from reca import objective
from reca.config.recipe import TaskConfig
from reca.config.recipe_files import load_recipe, recipe_names
from reca.data.loader import Stream, open_loader
from reca.data.micro_batches import (
    accumulation_steps,
    describe_split,
    micro_batch_sizes,
    passes_by_tokens,
    shares_of,
    size_warning,
    split_batch,
)
from reca.objective import backward, evaluate
from reca.optim import check_passes
from reca.options.fields import RecipeError
from tests.driver.toy import ToyAdapter

RANKS = [1, 2, 3, 4, 6, 8, 16, 64]


def counted(shares):
    return [i for rank in shares for s in rank if s.counted for i in range(s.start, s.start + s.size)]


@pytest.mark.parametrize("ranks", [*RANKS, 5, 7, 100])
def test_every_sample_once_and_equal_work(ranks):
    for batch_size, micro_batch in itertools.product(
        [1, 2, 3, 5, 7, 10, 20, 48, 64, 96, 97], [1, 2, 3, 4, 48, 64, 200]
    ):
        shares = split_batch(batch_size, micro_batch, ranks)
        assert sorted(counted(shares)) == list(range(batch_size))
        assert len(shares) == ranks and len({len(rank) for rank in shares}) == 1
        everything = [s for rank in shares for s in rank]
        assert all(1 <= s.size <= micro_batch and 0 <= s.start <= batch_size - s.size for s in everything)
        sizes_ = {s.size for s in everything if s.counted}
        assert max(sizes_) - min(sizes_) <= 1
        # The slowest rank of every pass, added up, computes no more than an even division gives one rank.
        assert sum(max(s.size for s in one) for one in zip(*shares, strict=True)) == math.ceil(batch_size / ranks)
        assert len(shares[0]) == math.ceil(math.ceil(batch_size / ranks) / micro_batch)


@pytest.mark.parametrize("ranks", RANKS)
def test_copies_are_micro_batches_that_another_rank_counts(ranks):
    """A loss that is not finite is then so on that rank, too, which skips the step by itself."""
    for batch_size, micro_batch in itertools.product(range(1, 70), [1, 2, 3]):
        everything = [s for rank in split_batch(batch_size, micro_batch, ranks) for s in rank]
        assert {s[:2] for s in everything if not s.counted} <= {s[:2] for s in everything if s.counted}


def test_micro_batches_of_the_recipe_stay_where_they_fit():
    """With objective.mean=micro_batch the step is then the same, too."""
    whole = [(s.start, s.size) for s in split_batch(96, 12, 1)[0]]
    for ranks in (2, 4, 8):
        assert sorted((s.start, s.size) for rank in split_batch(96, 12, ranks) for s in rank) == whole


def test_splits_by_hand():
    def starts_and_sizes(*numbers):
        return [[(s.start, s.size) if s.counted else None for s in rank] for rank in split_batch(*numbers)]

    assert starts_and_sizes(10, 2, 1) == [[(0, 2), (2, 2), (4, 2), (6, 2), (8, 2)]]
    assert starts_and_sizes(10, 2, 2) == [[(0, 2), (4, 2), (8, 1)], [(2, 2), (6, 2), (9, 1)]]
    assert starts_and_sizes(10, 2, 3) == [[(0, 2), (6, 2)], [(2, 2), (8, 1)], [(4, 2), (9, 1)]]
    assert starts_and_sizes(3, 1, 2) == [[(0, 1), (2, 1)], [(1, 1), None]]
    assert (
        micro_batch_sizes(10, 2, 8) == [2, 1]
        and micro_batch_sizes(10, 2, 16) == [1]
        and micro_batch_sizes(10, 2, 5) == [2]
    )
    ten = TaskConfig(batch_size=10, micro_batch=2)
    assert describe_split(ten, 8) == "1 to 2 per GPU, 1 pass of 2 or 1"
    assert describe_split(ten, 16) == "0 to 1 per GPU, 1 pass of 1"
    assert describe_split(ten, 1) == "10 per GPU, 5 passes of 2"
    ten.max_tokens = 99
    assert describe_split(ten, 4) == "2 to 3 per GPU, passes of up to 99 tokens"
    assert [[s.size for s in rank] for rank in shares_of(ten, 4)] == [[3], [3], [2], [2]]


def test_passes_by_tokens():
    """Packed: sums up to 10; padded: the longest, as often as there are samples. What is longer is alone."""
    assert passes_by_tokens([4, 3, 3, 1, 9, 11, 2, 2], 10, packed=True) == [3, 2, 1, 2]
    assert passes_by_tokens([4, 3, 3, 1, 9, 11, 2, 2], 10, packed=False) == [2, 2, 1, 1, 2]
    assert passes_by_tokens([5], 3, packed=True) == [1] and passes_by_tokens([5, 5], 3, packed=False) == [1, 1]


def test_numbers_below_one():
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got"):
            split_batch(*numbers)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_start_on_any_number_of_gpus(name):
    recipe = load_recipe(name)
    for ranks, task in itertools.product(RANKS, recipe.active_tasks()):
        config = getattr(recipe.objective, task)
        assert len(counted(split_batch(config.batch_size, config.micro_batch, ranks))) == config.batch_size
        assert accumulation_steps(config, ranks) >= 1
        changed = any(
            size != config.micro_batch for size in micro_batch_sizes(config.batch_size, config.micro_batch, ranks)
        )
        said = size_warning(recipe.objective, [task], ranks)
        assert (f"{task} " in (said or "")) == (changed and recipe.objective.mean == "micro_batch")
    assert not size_warning(recipe.objective, recipe.active_tasks(), 1)


def test_positions_do_not_depend_on_the_ranks():
    """Three steps of 10 from the second on. The neighbour is the next sample, and the first after the last."""
    for ranks in RANKS:
        seen = set()
        for shares in split_batch(10, 3, ranks):
            rank = itertools.islice(Stream(shares, 10, start=10, neighbours=True), 3 * len(shares))
            for share, positions, (neighbour,) in rank:
                step = positions[-1] // 10 * 10
                assert neighbour == (positions[-1] + 1 if positions[-1] % 10 < 9 else step)
                seen |= set(positions) if share.counted else set()
        assert seen == set(range(10, 40))


def gradient(recipe, micro_batch, condition="own", mean="batch", batch_size=7, max_tokens=None):
    """Of one step of the toy model on one rank."""
    keys = (f"objective.condition={condition}", f"objective.mean={mean}", f"objective.reca.batch_size={batch_size}")
    r, adapter = recipe(*keys), ToyAdapter(dtype=torch.float64)
    other = condition == "other"
    loader = open_loader(
        r.data, "reca", adapter.views("reca"), seed=0, micro_batch=micro_batch, batch_size=batch_size, neighbours=other,
        max_tokens=max_tokens, prepare=adapter.prepare,
    )  # fmt: skip
    batches = next(loader.steps())
    sums = backward(adapter, {"reca": batches}, r.objective, 0, torch.autocast("cpu", enabled=False))
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]), sums["reca"]


@pytest.mark.parametrize("condition", ["own", "other"])
def test_sizes_do_not_change_the_update(recipe, condition):
    expected, sums = gradient(recipe, 7, condition)
    for micro_batch in (1, 2, 3, 4, 5, 6):
        found, same = gradient(recipe, micro_batch, condition)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(same, sums)
    for max_tokens in (1, 4, 7):
        found, same = gradient(recipe, 7, condition, max_tokens=max_tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(same, sums)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_step_by_tokens_is_this_step_after_a_resume_too(recipe, workers):
    """Samples of 1, 2 and 3 tokens; ranks of 4 and 3 samples. The next of the step is every pass's neighbour."""
    r, adapter = recipe(f"data.workers={workers}"), ToyAdapter()
    given = dict(seed=0, micro_batch=99, batch_size=7, max_tokens=4, neighbours=True, prepare=adapter.prepare)

    def steps(rank, start=0):
        loader = open_loader(r.data, "reca", adapter.views("reca"), **given, rank=rank, world_size=2, start=start)
        made = [
            [(batch.sample_ids.tolist(), int(batch.neighbour.sample_ids)) for batch in step]
            for step in itertools.islice(loader.steps(), 3)
        ]
        loader.close()
        return made

    assert steps(0)[:2] == [[([0, 1], 2), ([2, 3], 4)], [([7], 8), ([8, 9], 10), ([10], 11)]]
    assert steps(1)[0] == [([4], 5), ([5, 6], 0)]
    assert steps(0, start=7)[:2] == steps(0)[1:] and steps(1, start=7)[:2] == steps(1)[1:]


def test_other_is_not_own(recipe):
    assert not torch.allclose(gradient(recipe, 1, "other")[0], gradient(recipe, 1, "own")[0], atol=1e-6)


def test_mean_of_micro_batches_by_their_shares_of_samples(recipe):
    """7 samples in 3, 2 and 2: each mean by 3/7, 2/7 and 2/7. With one sample in each it is the mean over samples."""
    for micro_batch, parts in ((3, [(0, 3), (3, 2), (5, 2)]), (1, [(i, 1) for i in range(7)])):
        found, sums = gradient(recipe, micro_batch, mean="micro_batch")
        r, adapter = recipe("objective.reca.batch_size=7"), ToyAdapter(dtype=torch.float64)
        from reca.data.batch import task_rng

        loss = 0
        for start, size in parts:
            loader = open_loader(r.data, "reca", adapter.views("reca"), seed=0, micro_batch=size, start=start)
            term = adapter(next(iter(loader)), task_rng(0, "reca"))
            loss = loss + size / 7 * term.sum / term.weight
        loss.backward()
        assert float(sums[0] / sums[1]) == pytest.approx(float(loss.detach()), rel=1e-6)  # what is logged
        expected = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_ranks_exchange_gradients_in_the_last_pass_of_a_step(recipe, monkeypatch):
    exchanged = []
    monkeypatch.setattr(objective, "set_gradient_sync", lambda _, last: exchanged.append(last))
    gradient(recipe, 3)
    assert exchanged == [False, False, True]


def test_a_copy_adds_nothing_even_if_its_loss_is_not_finite(recipe):
    r, adapter, eager = recipe(), ToyAdapter(dtype=torch.float64), torch.autocast("cpu", enabled=False)
    given = dict(seed=0, micro_batch=1, batch_size=1, world_size=2, start=1)
    one, copied = (next(iter(open_loader(r.data, "reca", adapter.views("reca"), **given, rank=i))) for i in (0, 1))
    assert one.counted and not copied.counted
    forward, found = adapter.forward, []
    broken = {True: 0.0, False: float("nan")}

    def loss(batch, *rest):
        term = forward(batch, *rest)
        return term._replace(sum=term.sum + broken[batch.counted])

    adapter.forward = loss
    for batches in ([one], [one, copied], [copied, one]):
        adapter.zero_grad()
        sums = backward(adapter, {"reca": batches}, r.objective, 0, eager)["reca"].tolist()
        grads = torch.cat([p.grad.flatten() for p in adapter.layers.parameters()])
        found.append((sums, evaluate(adapter, batches, 0, eager), grads))
    (sums, mean, grads), *others = found
    assert sums[1] == 2 and mean == pytest.approx(sums[0] / 2) and grads.any()  # sample 1 counts twice
    assert all(other[:2] == (sums, mean) and torch.equal(other[2], grads) for other in others)
    assert backward(adapter, {"reca": [copied]}, r.objective, 0, eager)["reca"].tolist() == [0, 0]
    assert evaluate(adapter, [copied], 0, eager) == 0


def test_what_a_number_of_tokens_cannot_go_with(recipe):
    with pytest.raises(RecipeError, match="reca.max_tokens=9 needs objective.mean=batch"):
        recipe("objective.mean=micro_batch", "objective.reca.max_tokens=9")
    with pytest.raises(RecipeError, match="micro_batch=auto chooses objective.reca.micro_batch, which"):
        recipe("train.micro_batch=auto", "objective.reca.max_tokens=9")
    fused = recipe("optim.fused_backward=true", "optim.max_grad_norm=null", "objective.reca.max_tokens=9")
    with pytest.raises(RecipeError, match="number depends on the samples' lengths"):
        check_passes(fused, 7)
    check_passes(fused, 8)  # one sample to a rank
    check_passes(recipe("objective.reca.max_tokens=9"), 7)


def test_condition_other_needs_another_sample(recipe):
    with pytest.raises(RecipeError, match="condition=other takes h_v from another sample"):
        recipe("objective.condition=other", "objective.reca.batch_size=1")
