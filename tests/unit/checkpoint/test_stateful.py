"""Parts of a run come back: what is shared, what each rank has of its own, and sums on any number of ranks."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.checkpoint.manifest import read_index, read_manifest
from moe_dist.checkpoint.random_state import RandomState
from moe_dist.checkpoint.save_and_load import read_checkpoint, write_checkpoint
from moe_dist.checkpoint.sharded_tensor import Shard, ShardedTensor, State
from moe_dist.checkpoint.stateful import Stateful, allocate_like, load_state, tensors_of, values_of
from moe_dist.training.run_history import RunHistory
from tests.unit.checkpoint.samples import manifest, state


class Keeper:
    """Holds whatever state it is given."""

    summed_over_ranks = ("sum",)
    own_of_rank = ("own",)

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state or {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.state = dict(state)


def write(folder: Path, ranks: list[Stateful]) -> None:
    """What ranks with these parts would write together, by one process."""
    together: State = {}
    for rank, part in enumerate(ranks):
        for name, tensor in tensors_of({"p": part}, rank, len(ranks)).items():
            known = together.setdefault(name, ShardedTensor(tensor.shape, tensor.dtype))
            starts = {old.start for old in known.shards}
            known.shards = [*known.shards, *(new for new in tensor.shards if new.start not in starts)]
    filled = manifest().model_copy(update={"values": values_of({"p": ranks[0]})})
    write_checkpoint(folder, filled, together, rank=0)


def read(folder: Path, part: Stateful, rank: int, ranks: int) -> None:
    parts = {"p": part}
    room = allocate_like(parts, read_index(folder), rank, ranks)
    read_checkpoint(folder, room)
    load_state(parts, room, read_manifest(folder))


def keeper(rank: int) -> Keeper:
    return Keeper(
        {"shared": torch.tensor([[1.5], [2.5]]), "sum": torch.tensor(2**rank), "own": torch.tensor([rank]), "text": "x"}
    )


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6))
def test_sums_stay_and_own_values_return_on_the_same_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int
) -> None:
    folder = tmp_path_factory.mktemp("parts") / "c"
    write(folder, [keeper(rank) for rank in range(before)])
    found = [Keeper() for _ in range(after)]
    for rank, part in enumerate(found):
        read(folder, part, rank, after)
        assert part.state["shared"].tolist() == [[1.5], [2.5]]
        assert part.state["text"] == "x"
        assert ("own" in part.state) is (before == after)
    assert sum(int(part.state["sum"]) for part in found) == 2**before - 1
    if before == after:
        assert [int(part.state["sum"]) for part in found] == [2**rank for rank in range(before)]
        assert [int(part.state["own"]) for part in found] == list(range(before))


def test_a_part_that_the_checkpoint_does_not_know_stays_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", manifest(), state(), rank=0)
    part = keeper(3)
    read(tmp_path / "c", part, 0, 1)
    assert str(part.state) == str(keeper(3).state)


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random()]

    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        np.random.randn()  # leaves half of a pair of normal numbers behind
        write(tmp_path / "c", [RandomState()])
        expected = draw()
        draw()
        read(tmp_path / "c", RandomState(), 0, 1)
        assert draw() == expected
        read(tmp_path / "c", RandomState(), 0, 2)  # another number of ranks: nothing to go on with
        assert draw() != expected
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def test_a_shard_is_a_view() -> None:
    values = torch.arange(6.0)
    ShardedTensor.whole(values.view(2, 3)).shards[0].values.fill_(1)
    assert values.tolist() == [1] * 6
    assert Shard(0, values).values is values


def test_values_are_those_of_the_moment_though_the_manifest_is_written_later() -> None:
    history = RunHistory(curve=[{"step": 4, "tokens": 8, "loss": 1.5}])
    values = values_of({"history": history})
    history.curve[0]["loss"] = 0.5
    history.curve.append({"step": 8, "tokens": 16, "loss": 0.25})
    assert values["history"]["curve"] == [{"step": 4, "tokens": 8, "loss": 1.5}]
