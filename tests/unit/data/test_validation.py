"""Validation reads the same sequences, once each, in as many forward passes on every rank, for any number of ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data.sequences import ConcatenatedSequences
from moe_dist.data.validation import ValidationBatch, validation_batches
from tests.unit.data.samples import tokens_in_memory

COUNTS = st.integers(1, 30)


def on_all_ranks(sequences: int, most: int, ranks: int, batch: int) -> list[list[ValidationBatch]]:
    source = ConcatenatedSequences(tokens_in_memory(sequences * 3 + 2), 3)
    return [list(validation_batches(source, most, rank, ranks, batch)) for rank in range(ranks)]


def mean_loss(sequences: int, most: int, ranks: int, batch: int) -> float:
    """The mean of a loss that differs from sequence to sequence, exactly representable."""
    batches = [one for rank in on_all_ranks(sequences, most, ranks, batch) for one in rank]
    total = sum(float((one.weight * one.tokens[:, 0]).double().sum()) for one in batches)
    return total / sum(float(one.weight.sum()) for one in batches)


@settings(deadline=None)
@given(COUNTS, COUNTS, st.integers(1, 7), st.integers(1, 7))
def test_the_mean_is_the_same_for_any_ranks_and_batch(sequences: int, most: int, ranks: int, batch: int) -> None:
    assert mean_loss(sequences, most, ranks, batch) == mean_loss(sequences, most, 1, 1)


@settings(deadline=None)
@given(COUNTS, COUNTS, st.integers(1, 7), st.integers(1, 7))
def test_every_rank_makes_the_same_passes_and_no_sequence_counts_twice(
    sequences: int, most: int, ranks: int, batch: int
) -> None:
    by_rank = on_all_ranks(sequences, most, ranks, batch)
    shapes = [[one.tokens.shape for one in rank] for rank in by_rank]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(0 < len(one.weight) <= batch and one.tokens.shape[1] == 4 for rank in by_rank for one in rank)
    rows = torch.cat([one.tokens for rank in by_rank for one in rank])
    weight = torch.cat([one.weight for rank in by_rank for one in rank])
    counted = (rows[weight == 1, 0] // 3).tolist()
    assert len(counted) == len(set(counted)) == min(most, sequences) == int(weight.sum())
    assert max(counted) < sequences
    assert torch.equal(rows - rows[:, :1], torch.arange(4).expand_as(rows))


def test_a_limited_evaluation_is_spread_over_the_text() -> None:
    (only,) = on_all_ranks(100, 4, 1, 4)[0]
    assert (only.tokens[:, 0] // 3).tolist() == [0, 25, 50, 75]
