"""The hash by which a run's seed becomes those of its tasks and steps."""

import pytest
import torch

from reca.rng import CounterRNG, RandomStream, seeded_normal

# The first outputs of SplitMix64 by its state at the start: those that the author's C code prints.
SPLITMIX64 = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
}


@pytest.mark.parametrize("state", SPLITMIX64)
def test_seeds_are_hashed_by_splitmix64(state):
    """Runs of other versions, and a resumed run, draw the same numbers only if the hash stays as it is."""
    found = [CounterRNG(number, state).seed for number in range(len(SPLITMIX64[state]))]
    assert [seed % (1 << 64) for seed in found] == SPLITMIX64[state]
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in found)  # fits int64


def test_a_path_is_hashed_part_by_part():
    assert CounterRNG(7, 1, 2).seed == CounterRNG(7, 1).fold_in(2).seed != CounterRNG(7, 2, 1).seed
    assert CounterRNG(7).seed == 7


def test_noise_of_an_image_is_that_of_sample_0():
    found = seeded_normal(7, RandomStream.NOISE, (2, 3, 4), torch.device("cpu"))
    expected = CounterRNG(7).normal(RandomStream.NOISE, torch.tensor([0]), 24)
    assert found.shape == (2, 3, 4) and torch.equal(found.flatten(), expected[0])
