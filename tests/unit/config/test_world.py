"""Fitting a configuration to a number of ranks."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_dist.config import RunConfig, load_config, resolve_batch, resolve_world
from moe_dist.errors import ConfigError

COUNTS = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])


def config_of(kind: str, clusters: int, per_cluster: int, **world: int | None) -> RunConfig:
    moe = {"kind": kind, "experts": clusters * per_cluster, "clusters": clusters, "top_k": 1}
    return RunConfig.model_validate({"moe": moe, "world": world})


@given(
    ranks=st.integers(1, 64),
    kind=st.sampled_from(["clustered", "standard", "dense"]),
    clusters=COUNTS,
    per_cluster=COUNTS,
    data=st.none() | COUNTS,
    cluster=st.none() | COUNTS,
    shard=st.sampled_from([1, 2, 3]),
)
def test_a_resolved_world_uses_every_rank_and_divides_the_experts(
    ranks: int, kind: str, clusters: int, per_cluster: int, data: int | None, cluster: int | None, shard: int
) -> None:
    try:
        config = config_of(kind, clusters, per_cluster, data=data, cluster=cluster, shard=shard)
        shape = resolve_world(config, ranks)
    except ConfigError:
        assume(False)
    assert shape.data * shape.cluster * shape.shard == ranks == shape.ranks
    replicas = shard if kind == "clustered" else 1
    assert (shape.shard * shape.replicas, shape.replicas) == (shard, replicas)
    assert data in (None, shape.data // shape.replicas)
    assert cluster in (None, shape.cluster)
    if kind == "clustered":
        assert clusters % shape.cluster == 0
        assert per_cluster % shape.shard == 0
    if kind == "standard":
        assert (clusters * per_cluster) % (shape.cluster * shape.shard) == 0


@pytest.mark.parametrize(
    ("ranks", "words", "shape"),
    [
        (1, [], (1, 1, 1)),
        (4, [], (1, 4, 1)),
        (8, [], (2, 4, 1)),
        (2, [], (1, 2, 1)),
        (4, ["world.data=2"], (2, 2, 1)),
        (4, ["world.shard=2"], (2, 2, 1)),
        (8, ["world.shard=2", "world.data=2"], (4, 2, 1)),
        (4, ["world.shard=2", "moe.kind=standard"], (1, 2, 2)),
        (4, ["world.shard=2", "world.shard_mode=experts"], (1, 2, 2)),
        (4, ["world.data=2", "world.cluster=1", "world.shard=2", "world.shard_mode=experts"], (2, 1, 2)),
        (6, [], (3, 2, 1)),
        (4, ["moe.kind=dense"], (4, 1, 1)),
    ],
)
def test_axes_left_open_are_filled_in(ranks: int, words: list[str], shape: tuple[int, int, int]) -> None:
    found = resolve_world(load_config(None, words), ranks)
    assert (found.data, found.cluster, found.shard) == shape


@pytest.mark.parametrize(
    ("ranks", "words", "parts"),
    [
        (3, ["world.shard=2"], ["world.shard=2", "(3)"]),
        (4, ["world.data=3"], ["world.data=3", "there are 4: set world.data=4, or start that many"]),
        (
            8,
            ["world.data=1", "world.cluster=4"],
            ["world.data=1", "= 4 ranks", "there are 8: set world.data=2"],
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(ranks: int, words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_world(load_config(None, words), ranks)
    for part in parts:
        assert part in str(caught.value)


@given(ranks=st.integers(1, 32), batch=st.integers(1, 256), micro=st.none() | st.integers(1, 16))
def test_a_resolved_batch_is_the_global_batch(ranks: int, batch: int, micro: int | None) -> None:
    train = {"global_batch_size": batch, "micro_batch_size": micro}
    if batch % ranks or (batch // ranks) % (micro or 1):
        with pytest.raises(ConfigError, match=f"train.global_batch_size={batch}"):
            resolve_batch(RunConfig.model_validate({"train": train}), ranks)
        return
    shape = resolve_batch(RunConfig.model_validate({"train": train}), ranks)
    assert shape.micro * shape.accumulation * ranks == batch
    assert micro in (None, shape.micro)
