"""Training batches: a pure function of (seed, step), the same for any number of ranks, each sequence once an epoch."""

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data.blend import BlendPlan
from moe_dist.data.loader import EVERYTHING, Batch, PrefetchingLoader, SequenceLoader
from moe_dist.data.sequences import ConcatenatedSequences, Sequences
from moe_dist.errors import DataError
from tests.unit.data.samples import tokens_in_memory

SEEDS = st.integers(0, 2**40)


def one_source(sequences: int, length: int) -> Mapping[str, Sequences]:
    return {"": ConcatenatedSequences(tokens_in_memory(sequences * length + 1), length)}


def one_rank(sequences: int, length: int, batch: int, seed: int) -> SequenceLoader:
    return SequenceLoader(one_source(sequences, length), batch, seed, 0, 1)


def global_batch(
    sources: Mapping[str, Sequences], batch: int, seed: int, step: int, ranks: int, plan: BlendPlan = EVERYTHING
) -> Batch:
    parts = [SequenceLoader(sources, batch, seed, rank, ranks, plan).batch(step) for rank in range(ranks)]
    return Batch(*(torch.cat(each) for each in zip(*parts, strict=True)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 5), SEEDS, st.integers(0, 30), st.integers(1, 6), st.integers(1, 6))
def test_any_number_of_ranks_gives_the_same_global_batch(
    sequences: int, length: int, seed: int, step: int, ranks: int, per_rank: int
) -> None:
    batch, sources = ranks * per_rank, one_source(sequences, length)
    one = global_batch(sources, batch, seed, step, 1).sequences_BS
    assert one.dtype == torch.int64
    assert one.shape == (batch, length + 1)
    assert torch.equal(global_batch(sources, batch, seed, step, ranks).sequences_BS, one)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 25), SEEDS, st.integers(1, 4))
def test_each_sequence_comes_once_an_epoch_also_across_its_end(
    sequences: int, length: int, batch: int, seed: int, epochs: int
) -> None:
    loader = one_rank(sequences, length, batch, seed)
    steps = -(-epochs * sequences // batch)
    rows = torch.cat([loader.batch(step).sequences_BS for step in range(steps)])[: epochs * sequences]
    # ids are positions, so that a row's first id names the sequence
    for epoch in rows[:, 0].reshape(epochs, sequences):
        assert sorted(epoch.tolist()) == [i * length for i in range(sequences)]
    assert torch.equal(rows - rows[:, :1], torch.arange(length + 1).expand_as(rows))


WEIGHTS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any)


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, st.lists(st.tuples(st.integers(1, 9), WEIGHTS), max_size=2), SEEDS, st.permutations(range(12)))
def test_a_blend_is_the_same_on_any_ranks_and_after_resuming_at_any_step(
    first: list[float], later: list[tuple[int, list[float]]], seed: int, steps: list[int]
) -> None:
    batch = 4
    changes = [(0, first), *((step * batch, weights) for step, weights in sorted(dict(later).items()))]
    sources = {
        name: ConcatenatedSequences(tokens_in_memory(2 * n + 1), 2) for name, n in (("a", 5), ("b", 9), ("c", 30))
    }
    plan = BlendPlan(changes, [None, None, None])
    rows = {step: global_batch(sources, batch, seed, step, 1, plan) for step in steps}  # in any order
    fresh = BlendPlan(changes, [None, None, None])
    for step in (min(steps, key=lambda step: (step % 5, step)), 11):
        for ranks in (2, 4):
            again = global_batch(sources, batch, seed, step, ranks, fresh)
            assert torch.equal(again.sequences_BS, rows[step].sequences_BS)
            assert torch.equal(again.source_B, rows[step].source_B)
    drawn = torch.cat([rows[step].source_B for step in range(12)])
    assert tuple(torch.bincount(drawn, minlength=3).tolist()) == plan.drawn(12 * batch)
    for number, sequences in enumerate(sources.values()):  # epochs without a gap, whatever comes between
        mine = torch.cat([rows[step].sequences_BS for step in range(12)])[drawn == number][:, 0].tolist()
        for epoch in range(0, len(mine) - len(sequences) + 1, len(sequences)):
            assert len(set(mine[epoch : epoch + len(sequences)])) == len(sequences)


def test_weights_after_a_change_do_not_touch_the_steps_before() -> None:
    sources = {"": one_source(7, 1)[""], "b": ConcatenatedSequences(tokens_in_memory(12), 1)}
    kept, changed = BlendPlan([(0, [1, 2])], [None] * 2), BlendPlan([(0, [1, 2]), (20, [5, 0])], [None] * 2)
    for step in range(8):
        before, after = (global_batch(sources, 4, 0, step, 1, plan) for plan in (kept, changed))
        assert torch.equal(before.sequences_BS, after.sequences_BS) == (step < 5)
    assert global_batch(sources, 4, 0, 5, 1, changed).source_B.tolist() == [0] * 4


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(1, 25), SEEDS, st.permutations(range(6)))
def test_a_batch_does_not_depend_on_the_steps_before(sequences: int, batch: int, seed: int, steps: list[int]) -> None:
    used = one_rank(sequences, 3, batch, seed)
    for step in steps:
        fresh = one_rank(sequences, 3, batch, seed).batch(step)
        assert torch.equal(used.batch(step).sequences_BS, fresh.sequences_BS)


def test_every_token_but_the_first_is_a_target_once() -> None:
    batch = one_rank(8, 4, 8, 0).batch(0)
    assert Counter(batch.sequences_BS[:, 1:].flatten().tolist()) == Counter(range(1, 33))


def test_epochs_seeds_and_sources_are_shuffled_differently() -> None:
    orders = {tuple(one_rank(100, 1, 100, seed).indices(epoch)[1].tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(100)) not in orders
    named = {"web": one_source(100, 1)[""]}
    assert tuple(SequenceLoader(named, 100, 0, 0, 1).indices(0)[1].tolist()) not in orders


def test_batches_of_next_steps_are_read_ahead_and_may_be_asked_for_twice() -> None:
    read = []

    class Recorded(SequenceLoader):
        def batch(self, step: int) -> Batch:
            read.append(step)
            return super().batch(step)

    plain = one_rank(9, 3, 4, 0)
    loader = PrefetchingLoader(Recorded(one_source(9, 3), 4, 0, 0, 1))
    for step in (0, 1, 1, 2, 7, 6):
        assert torch.equal(loader.batch(step).sequences_BS, plain.batch(step).sequences_BS)
    loader.close()
    assert read[:5] == [0, 1, 2, 3, 4]  # each once, though 1 was asked for twice


def test_an_error_of_the_thread_is_that_of_its_step() -> None:
    class Broken(SequenceLoader):
        def batch(self, step: int) -> Batch:
            if step == 1:
                raise DataError("cannot be read")
            return super().batch(step)

    loader = PrefetchingLoader(Broken(one_source(9, 3), 4, 0, 0, 1))
    loader.batch(0)
    with pytest.raises(DataError, match="cannot be read"):
        loader.batch(1)
    loader.close()


def test_shares_of_targets_follow_the_weights() -> None:
    class Half(ConcatenatedSequences):
        target_share = 0.5

    sources = {"a": one_source(9, 3)[""], "b": Half(tokens_in_memory(31), 3)}
    loader = SequenceLoader(sources, 4, 0, 0, 1, BlendPlan([(0, [1, 3]), (8, [1, 0])], [None] * 2))
    assert [loader.target_share(step) for step in (0, 1, 2)] == [0.25 + 0.375, 0.25 + 0.375, 1.0]


def test_too_little_text_names_the_sequence_length() -> None:
    assert len(ConcatenatedSequences(tokens_in_memory(9), 8)) == 1
    with pytest.raises(DataError, match=r"^train text of 8 tokens is shorter than .*model\.sequence_length=8"):
        ConcatenatedSequences(tokens_in_memory(8), 8)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (2, 2), (-1, 2)])
def test_ranks_that_do_not_fit_the_batch_are_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {ranks}"):
        SequenceLoader(one_source(4, 2), 4, 0, rank, ranks)
