"""Layers outside of our trainer, in one process: outputs, state, balancing, refusals."""

import io

import pytest
import torch
from torch import nn

from moe_dist import ClusteredMoE, MoEConfig, StandardMoE, update_load_balance
from moe_dist.errors import ConfigError

CLUSTERED = MoEConfig(experts=8, clusters=4, top_k=2, expert_hidden=16, rank=2, balance_rate=0.1)
STANDARD = MoEConfig(kind="standard", experts=8, top_k=2, expert_hidden=16)


def _layer(moe: MoEConfig, seed: int = 0) -> ClusteredMoE | StandardMoE:
    return (ClusteredMoE if moe.kind == "clustered" else StandardMoE)(16, moe, seed=seed, init_std=0.3)


def _x(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("moe", [CLUSTERED, CLUSTERED.model_copy(update={"top_clusters": 2}), STANDARD])
def test_state_dict_holds_all_that_the_output_depends_on(moe: MoEConfig) -> None:
    trained = _layer(moe)
    for step in range(20):
        trained(_x(step))
        update_load_balance(trained)
    if isinstance(trained, ClusteredMoE):  # as a re-clustering would leave it
        members = ((7, 2), (1, 3), (4, 5), (6, 0))
        trained.context.placements[0] = trained.placement.with_members(members)
        trained.follow_placement()
    expected = trained(_x(99))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    other = _layer(moe, seed=1)
    assert not torch.allclose(other(_x(99)), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(_x(99)), expected, rtol=0, atol=0)


def test_missing_biases_are_named() -> None:
    layer = _layer(CLUSTERED)
    state = {name: value for name, value in layer.state_dict().items() if "bias_" not in name or "." in name}
    with pytest.raises(RuntimeError, match="cluster_bias_G"):
        layer.load_state_dict(state)
    missing = layer.load_state_dict(state, strict=False).missing_keys
    assert sorted(missing) == ["cluster_bias_G", "expert_bias_E"]


def test_state_of_a_layer_inside_of_a_model_has_its_prefix() -> None:
    model = nn.Sequential(nn.Linear(16, 16), _layer(CLUSTERED))
    assert {"1.expert_bias_E", "1.cluster_bias_G", "1.member_GN"} <= model.state_dict().keys()
    model.load_state_dict(model.state_dict())


def test_balancing_evens_out_the_loads_of_clusters() -> None:
    layer = _layer(CLUSTERED)
    assert isinstance(layer, ClusteredMoE)
    with torch.no_grad():
        layer.router.weight_ED[:2] += 1.0  # the first cluster is liked by half of the tokens more
    x = torch.randn(256, 4, 16)

    def largest_share() -> float:
        layer(x)
        count_LE = update_load_balance(layer)["count_LE"]
        assert int(count_LE.sum()) == 256 * 4 * 2
        return float(count_LE[0].view(4, 2).sum(1).max()) / float(count_LE.sum())

    first = largest_share()
    for _ in range(60):
        last = largest_share()
    assert first > 0.4
    assert last < 0.32


def test_gradients_reach_every_parameter() -> None:
    layer = _layer(CLUSTERED)
    layer(torch.randn(64, 8, 16)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusteredMoE(16, STANDARD), "moe.kind=standard does not make this layer"),
        (lambda: StandardMoE(16, CLUSTERED), "moe.kind=clustered does not make this layer"),
        (lambda: update_load_balance(nn.Linear(2, 2)), "Linear holds no ClusteredMoE and no StandardMoE layer"),
    ],
)
def test_mistakes_are_refused_in_one_line(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
