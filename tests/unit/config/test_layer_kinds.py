"""Parameters of each kind of layer, counted by hand."""

import pytest

from moe_dist.config import MoEConfig


def _moe(kind: str, **more: object) -> MoEConfig:
    sizes = {"kind": kind, "experts": 32, "clusters": 4, "expert_hidden": 176, "rank": 4, "top_k": 2}
    return MoEConfig.model_validate({**sizes, **more})


@pytest.mark.parametrize(("kind", "expected"), [("clustered", 1_081_344), ("standard", 1_081_344), ("dense", 0)])
def test_as_many_standard_experts_have_three_matrices_each(kind: str, expected: int) -> None:
    """32 experts x 3 matrices x 64 x 176 = 32 x 33,792: the denominator of the share of expert parameters."""
    moe = _moe(kind)
    assert moe.layer_kind.standard_parameters(64, moe) == expected


def test_clustered_experts_have_a_base_a_cluster_and_a_residual_an_expert() -> None:
    """4 bases of 33,792; 32 residuals of 3 x 4 x (64 + 176) = 2,880 and vectors of 3 x 176 + 64 = 592."""
    moe = _moe("clustered")
    found = moe.layer_kind.parameters(64, moe, cluster=1, shard=1)
    assert found == (64 * 32, 4 * 33_792, 32 * (2_880 + 592))
    assert moe.layer_kind.parameters(64, moe, cluster=2, shard=4) == (64 * 32, 2 * 33_792, 2 * 2 * 3_472)
    bare = _moe("clustered", expert_vectors=False)
    assert bare.layer_kind.parameters(64, bare, cluster=1, shard=1).expert == 32 * 2_880


def test_standard_experts_divide_over_both_axes() -> None:
    moe = _moe("standard", shared_expert_hidden=10)
    assert moe.layer_kind.parameters(64, moe, cluster=2, shard=2) == (64 * 32 + 3 * 64 * 10, 0, 8 * 33_792)


def test_each_kind_computes_a_token_so_many_times() -> None:
    assert [_moe(kind, top_clusters=3).layer_kind.copies(_moe(kind, top_clusters=3)) for kind in
            ("clustered", "standard", "dense")] == [6, 2, 0]  # fmt: skip
