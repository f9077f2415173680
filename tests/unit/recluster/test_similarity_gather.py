"""Similarities gathered for a round: each term by hand, and sums over ranks where statistics differ."""

import pytest
import torch
import torch.distributed as dist

from moe_dist.config import ModelConfig, MoEConfig, RunConfig, load_config
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.routing_statistics import RoutingStatistics
from moe_dist.recluster.similarity_gather import gather_similarity

MOE = MoEConfig(experts=4, clusters=2, top_clusters=2, top_k=1, expert_hidden=8, rank=2)
ROWS = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [3, 0, 0, 0], [0, 3, 0, 0]])
"""Two pairs of equal rows; less their mean (1.5, 1.5, 0, 0) they are opposite: cosines 1 and -1."""
SPREAD = 8**0.5 / 3
"""Standard deviation over pairs: 4 of the 12 are 1, the others -1."""
PAIRS = [[one / SPREAD for one in row] for row in ([1.0, -1, 1, -1], [-1, 1, -1, 1], [1, -1, 1, -1], [-1, 1, -1, 1])]


def _config(*words: str) -> RunConfig:
    sizes = ["model.layers=1", "model.hidden_size=4", "model.heads=2", "moe.experts=4", "moe.clusters=2"]
    more = ["moe.top_clusters=2", "moe.top_k=1", "moe.expert_hidden=8", "moe.rank=2", "recluster.period=2"]
    return load_config(None, [*sizes, *more, "train.steps=100", "recluster.max_moved=1", *words])


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> ClusteredMoE:
    """One layer on one of two ranks that have the same statistics."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: tensor.mul_(2))
    model = ModelConfig(hidden_size=4, heads=2, layers=1)
    placement = ExpertPlacement.contiguous(4, 2, Mesh.alone().shape)
    balance = BalanceState.create(1, MOE, torch.device("cpu"))
    statistics = RoutingStatistics.create(1, 4, MOE, 0.5)
    context = LayerContext(Mesh.alone(), [placement], balance, TrafficLedger(Links.alone()), 0, statistics)
    statistics.collecting = True
    statistics.begin_step()
    return ClusteredMoE.in_model(0, model, MOE, context, 1.0)


def test_the_router_term_is_the_cosine_of_router_rows_less_their_mean(layer: ClusteredMoE) -> None:
    layer.router.weight_ED.data = ROWS
    found = gather_similarity([layer], _config("recluster.alpha=0", "recluster.router_weight=1"), layer.context)
    assert found.similarity_LEE[0] == pytest.approx(torch.tensor(PAIRS).numpy()), "experts 0 and 2 are alike, 1 and 3"
    assert found.parts == {"router": pytest.approx(-1.0)}, "the present clusters hold opposite experts"


def test_the_centroid_term_is_the_cosine_of_mean_tokens(layer: ClusteredMoE) -> None:
    statistics = layer.context.statistics
    assert statistics is not None
    weights = torch.tensor([[1.0], [0.5], [2.0], [0.25]])  # the mean over one token does not depend on its weight
    statistics.record_rows(0, ROWS, torch.arange(4)[:, None], weights, torch.arange(4))
    found = gather_similarity([layer], _config("recluster.alpha=0"), layer.context)
    assert found.similarity_LEE[0] == pytest.approx(torch.tensor(PAIRS).numpy())
    assert list(found.parts) == ["centroid"]
    assert statistics.activation[0].mass_E.tolist() == [1, 0.5, 2, 0.25], "a rank's own statistics do not change"


def test_terms_are_mixed_by_their_weights(layer: ClusteredMoE) -> None:
    statistics = layer.context.statistics
    assert statistics is not None
    layer.router.weight_ED.data = ROWS
    statistics.record_rows(0, ROWS[[0, 0, 1, 1]], torch.arange(4)[:, None], torch.ones(4, 1), torch.arange(4))
    found = gather_similarity([layer], _config("recluster.alpha=0", "recluster.router_weight=0.25"), layer.context)
    alike_EE = found.similarity_LEE[0] * SPREAD
    assert alike_EE[0, 1] == pytest.approx(0.75 * 1 + 0.25 * -1), "tokens alike, router rows opposite"
    assert alike_EE[0, 2] == pytest.approx(0.75 * -1 + 0.25 * 1), "tokens opposite, router rows alike"


def test_pairs_of_clusters_are_summed_over_ranks(layer: ClusteredMoE) -> None:
    statistics = layer.context.statistics
    assert statistics is not None
    statistics.record_clusters(0, torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    statistics.record_rows(0, ROWS, torch.arange(4)[:, None], torch.ones(4, 1), torch.arange(4))
    found = gather_similarity([layer], _config("recluster.alpha=0"), layer.context)
    assert found.together_LGG[0].tolist() == [[6, 6], [6, 6]], "three tokens on each of two ranks chose both"
    assert statistics.together_LGG[0].tolist() == [[3, 3], [3, 3]], "a rank's own counts do not change"


def test_a_term_that_is_not_finite_is_named_and_statistics_start_anew(layer: ClusteredMoE) -> None:
    statistics = layer.context.statistics
    assert statistics is not None
    statistics.record_rows(0, ROWS * float("nan"), torch.arange(4)[:, None], torch.ones(4, 1), torch.arange(4))
    found = gather_similarity([layer], _config("recluster.alpha=0"), layer.context)
    assert found.broken == ("centroid",)
    assert statistics.activation[0].weighted_ED.tolist() == [[0.0] * 4] * 4
