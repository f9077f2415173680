"""Recorded routing: layers replay the choices of a record, whatever their library; damaged or unfitting records."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist import ClusteredMoE, MoEConfig, StandardMoE
from moe_dist.benchmarks.layer.recorded_routing import RoutingRecord, _choices
from moe_dist.errors import ConfigError

TOKENS, HIDDEN, EXPERTS, CLUSTERS, K = 64, 32, 12, 4, 2
SIZES = {"experts": EXPERTS, "clusters": CLUSTERS, "top_k": K, "expert_hidden": 8, "rank": 1}


def _record(kind: str, top_clusters: int) -> RoutingRecord:
    """Skewed choices by hand: of two experts among all, or in each of some clusters of three."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(2 * TOKENS):
        if kind == "standard":
            rows.append(draw.choice(EXPERTS, K, replace=False, p=np.arange(1, 13) / 78))
            continue
        clusters = draw.choice(CLUSTERS, top_clusters, replace=False, p=[0.4, 0.3, 0.2, 0.1])
        rows.append(np.concatenate([3 * c + draw.choice(3, K, replace=False) for c in clusters]))
    facts: dict[str, str | int] = {
        "kind": kind,
        "experts": EXPERTS,
        "clusters": CLUSTERS,
        "top_clusters": top_clusters,
        "top_k": K,
    }
    return RoutingRecord(facts, np.array(rows, dtype=np.int64))


@pytest.mark.parametrize(("kind", "top_clusters"), [("standard", 1), ("clustered", 1), ("clustered", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_makes_the_recorded_choices(kind: str, top_clusters: int, dtype: torch.dtype) -> None:
    record = _record(kind, top_clusters)
    moe = MoEConfig.model_validate({**SIZES, "kind": kind, "top_clusters": top_clusters})
    layer = StandardMoE(HIDDEN, moe) if kind == "standard" else ClusteredMoE(HIDDEN, moe)
    assert record.suits(kind, moe)
    for rank in (0, 1):
        x_TD, weight_ED = record.inputs(TOKENS, HIDDEN, rank, 2, seed=3)
        with torch.no_grad():
            layer.router.weight_ED.copy_(weight_ED)
        found = [set(row.tolist()) for row in _choices(layer, x_TD.to(dtype))]
        assert found == [set(row.tolist()) for row in record.expert_TC[rank * TOKENS : (rank + 1) * TOKENS]]
    assert record.loads() == [int((record.expert_TC == expert).sum()) for expert in range(EXPERTS)]


def test_a_record_comes_back_and_suits_its_own_kind_alone(tmp_path: Path) -> None:
    record = _record("clustered", 1)
    record.write(tmp_path / "routing.npz")
    found = RoutingRecord.read(tmp_path / "routing.npz")
    assert found.facts == record.facts
    assert np.array_equal(found.expert_TC, record.expert_TC)
    other = MoEConfig.model_validate({**SIZES, "top_clusters": 2})
    assert not found.suits("clustered", other)
    assert not found.suits("standard", other)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    record = _record("standard", 1)
    with pytest.raises(ConfigError, match=r"--routing: 128 tokens are recorded, and 2 ranks of 100 need 200"):
        record.inputs(100, HIDDEN, 0, 2, 0)
    with pytest.raises(ConfigError, match=r"at least the 12 experts, --hidden is 8"):
        record.inputs(4, 8, 0, 2, 0)
    with pytest.raises(ConfigError, match=r"--routing \S+nothing.npz does not exist: write it with"):
        RoutingRecord.read(tmp_path / "nothing.npz")
    (tmp_path / "odd.npz").write_bytes(b"PK odd")
    with pytest.raises(ConfigError, match=r"--routing \S+odd.npz is no record of `moe-dist measure routing`"):
        RoutingRecord.read(tmp_path / "odd.npz")
