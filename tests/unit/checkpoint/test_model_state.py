"""Shards of named runs: the overlap of a run and of what this rank owns, in elements counted by hand."""

import pytest
import torch

from moe_dist.checkpoint.model_state import _overlap
from moe_dist.checkpoint.parameter_names import NamedRun

OWNED = torch.arange(10.0, 16.0)
"""Elements 10 to 15 of a flattened parameter, each of its own number."""


@pytest.mark.parametrize(
    ("start", "shape", "first", "values"),
    [
        (8, (2, 2), 2, [10.0, 11.0]),
        (12, (2,), 0, [12.0, 13.0]),
        (14, (4,), 0, [14.0, 15.0]),
        (4, (20,), 6, [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]),
    ],
)
def test_a_shard_holds_the_elements_that_run_and_fragment_share(
    start: int, shape: tuple[int, ...], first: int, values: list[float]
) -> None:
    (shard,) = _overlap(NamedRun("name", shape, start), 10, OWNED)
    assert (shard.start, shard.values.tolist()) == (first, values)


@pytest.mark.parametrize("start", [6, 16])
def test_runs_beside_the_fragment_have_no_shard_here(start: int) -> None:
    assert _overlap(NamedRun("name", (4,), start), 10, OWNED) == []
