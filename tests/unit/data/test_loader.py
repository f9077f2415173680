"""Training batches: a pure function of (seed, step), the same for any number of ranks, each sequence once an epoch."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data.loader import SequenceLoader
from moe_dist.errors import DataError
from tests.unit.data.samples import tokens_in_memory

SEEDS = st.integers(0, 2**40)


def global_batch(sequences: int, length: int, batch: int, seed: int, step: int, ranks: int) -> torch.Tensor:
    tokens = tokens_in_memory(sequences * length + 1)
    return torch.cat([SequenceLoader(tokens, length, batch, seed, rank, ranks).batch(step) for rank in range(ranks)])


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), SEEDS, st.integers(0, 30), st.integers(1, 6), st.integers(1, 6))
def test_any_number_of_ranks_gives_the_same_global_batch(
    sequences: int, length: int, seed: int, step: int, ranks: int, per_rank: int
) -> None:
    batch = ranks * per_rank
    one = global_batch(sequences, length, batch, seed, step, 1)
    assert one.dtype == torch.int64
    assert one.shape == (batch, length + 1)
    assert torch.equal(global_batch(sequences, length, batch, seed, step, ranks), one)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 25), SEEDS, st.integers(1, 4))
def test_each_sequence_comes_once_an_epoch_also_across_its_end(
    sequences: int, length: int, batch: int, seed: int, epochs: int
) -> None:
    tokens = tokens_in_memory(sequences * length + 1)
    loader = SequenceLoader(tokens, length, batch, seed, 0, 1)
    steps = -(-epochs * sequences // batch)
    rows = torch.cat([loader.batch(step) for step in range(steps)])[: epochs * sequences]
    # ids are positions, so that a row's first id names the sequence
    for epoch in rows[:, 0].reshape(epochs, sequences):
        assert sorted(epoch.tolist()) == [i * length for i in range(sequences)]
    assert torch.equal(rows - rows[:, :1], torch.arange(length + 1).expand_as(rows))


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 25), SEEDS, st.permutations(range(12)))
def test_a_batch_does_not_depend_on_the_steps_before(sequences: int, batch: int, seed: int, steps: list[int]) -> None:
    tokens = tokens_in_memory(sequences * 3 + 1)
    used = SequenceLoader(tokens, 3, batch, seed, 0, 1)
    for step in steps:
        assert torch.equal(used.batch(step), SequenceLoader(tokens, 3, batch, seed, 0, 1).batch(step))


def test_every_token_but_the_first_is_a_target_once() -> None:
    loader = SequenceLoader(tokens_in_memory(8 * 4 + 1), 4, 8, 0, 0, 1)
    assert Counter(loader.batch(0)[:, 1:].flatten().tolist()) == Counter(range(1, 33))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    tokens = tokens_in_memory(101)
    orders = {
        tuple(SequenceLoader(tokens, 1, 100, seed, 0, 1).indices(epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(100)) not in orders


def test_the_order_is_what_earlier_versions_of_numpy_gave() -> None:
    assert SequenceLoader(tokens_in_memory(9), 1, 8, 7, 0, 1).indices(1).tolist() == [7, 4, 3, 0, 1, 5, 2, 6]


def test_too_little_text_names_the_sequence_length() -> None:
    SequenceLoader(tokens_in_memory(9), 8, 1, 0, 0, 1)
    with pytest.raises(DataError, match=r"^train text of 8 tokens is shorter than .*model\.sequence_length=8"):
        SequenceLoader(tokens_in_memory(8), 8, 1, 0, 0, 1)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (2, 2), (-1, 2)])
def test_ranks_that_do_not_fit_the_batch_are_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {ranks}"):
        SequenceLoader(tokens_in_memory(9), 2, 4, 0, rank, ranks)
