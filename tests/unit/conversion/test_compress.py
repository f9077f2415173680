"""Compression of a layer, on one rank: which bases it makes, and how many full experts it holds at a time."""

import weakref

import pytest
import torch

from moe_dist.compression import ExpertMatrices
from moe_dist.config import MoEConfig
from moe_dist.conversion.compress import compress_clusters
from moe_dist.conversion.full_experts import FullExpert, FullExpertLayer
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES

D, F, EXPERTS, CLUSTERS = 12, 8, 8, 2
MESH = Mesh.alone()
PLACEMENT = ExpertPlacement.contiguous(EXPERTS, CLUSTERS, MESH.shape)


def _matrices(seed: int) -> ExpertMatrices:
    drawn = torch.Generator().manual_seed(seed)
    return ExpertMatrices(torch.randn(D, 2 * F, generator=drawn), torch.randn(F, D, generator=drawn))


class _Loads:
    """Loader of random experts that counts how many are held."""

    def __init__(self) -> None:
        self.alive, self.most = 0, 0

    def load(self, expert: int) -> ExpertMatrices:
        made = _matrices(expert)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(made, self._freed)
        return made

    def _freed(self) -> None:
        self.alive -= 1

    def layer(self, shared: ExpertMatrices | None = None) -> FullExpertLayer:
        tokens = torch.randn(20, D, generator=torch.Generator().manual_seed(99))
        experts = [FullExpert(e, lambda e=e: self.load(e), tokens, tokens) for e in range(EXPERTS)]  # type: ignore[misc]
        zeros = ExpertMatrices(torch.zeros(D, 2 * F), torch.zeros(F, D))
        group = MESH.group(GroupKind.EXPERT_PARALLEL)
        return FullExpertLayer(experts, dict.fromkeys(range(EXPERTS), 0), group, STATE_NAMES, zeros, shared)


def _moe(base: str = "cluster", rank: int = 2) -> MoEConfig:
    return MoEConfig(
        experts=EXPERTS, clusters=CLUSTERS, expert_hidden=F, rank=rank, base=base, base_rank=3, expert_vectors=False
    )


USAGE = torch.tensor([1.0, 2, 3, 4, 1, 1, 1, 5], dtype=torch.float64)


def test_a_rank_holds_two_full_experts_at_most() -> None:
    loads = _Loads()
    for _ in compress_clusters(loads.layer(), PLACEMENT, USAGE, _moe(), MESH, 0, range(CLUSTERS)):
        assert loads.alive == 0
    assert loads.most <= 2


def test_a_base_is_the_mean_by_usage_and_has_no_moments() -> None:
    made = list(compress_clusters(_Loads().layer(), PLACEMENT, USAGE, _moe(), MESH, 0, [1]))
    (cluster,) = made
    weights = torch.tensor([1, 1, 1, 5]) / 8
    expected = torch.zeros(D, 2 * F)
    for weight, expert in zip(weights, PLACEMENT.members[1], strict=True):
        expected += weight * _matrices(expert).w_in_DH
    assert torch.allclose(cluster.base["w_in_DH"][MASTER], expected, atol=1e-6)
    assert cluster.base["w_in_DH"].keys() == {MASTER}
    assert cluster.residuals.keys() == set(PLACEMENT.members[1])


def test_two_levels_keep_the_first_and_fit_factors_to_the_rest_of_the_mean() -> None:
    shared = _matrices(77)
    (cluster,) = compress_clusters(_Loads().layer(shared), PLACEMENT, USAGE, _moe("shared+cluster"), MESH, 0, [0])
    mean = sum(float(w) * _matrices(e).w_out_FD for w, e in zip(USAGE[:4] / 10, range(4), strict=True))
    u, s, v = torch.linalg.svd(mean - shared.w_out_FD, full_matrices=False)
    expected = u[:, :3] * s[:3] @ v[:3]
    states = [cluster.base[name] for name in ("out_p_FR", "out_q_RD")]
    assert torch.allclose(states[0][MASTER] @ states[1][MASTER], expected, atol=1e-5)
    assert all(not state[kind].any() for state in states for kind in STATE_NAMES if kind != MASTER)


@pytest.mark.parametrize("base", ["cluster", "shared+cluster"])
def test_a_full_rank_leaves_no_error(base: str) -> None:
    shared = _matrices(77) if base != "cluster" else None
    layer = _Loads().layer(shared)
    for cluster in compress_clusters(layer, PLACEMENT, USAGE, _moe(base, rank=F), MESH, 0, range(CLUSTERS)):
        assert float(cluster.figures_M3[:, 0].max()) < 1e-5 < float(cluster.figures_M3[:, 1].min())
