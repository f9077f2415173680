"""Initial values of the backbone: by name, of the right size, and the same in parts."""

import pytest
import torch
from torch import nn

from moe_dist.config import ModelConfig
from moe_dist.model.initial_values import draw_initial_values
from moe_dist.moe.parameter_class import ParameterClass, mark_parameter

MODEL = ModelConfig(layers=8, hidden_size=64, heads=4, init_std=0.5)


def _model(rows: int = 64, divided: bool = False) -> nn.Module:
    """Two attention layers beside a feed-forward layer, which is not touched."""
    layers = []
    for _ in range(2):
        attention = nn.ModuleDict({"linear_qkv": nn.Linear(64, rows), "linear_proj": nn.Linear(64, 64)})
        layers.append(nn.ModuleDict({"self_attention": attention, "mlp": nn.Linear(8, 8)}))
    gpt = nn.ModuleDict({"layers": nn.ModuleList(layers), "norm": nn.RMSNorm(64)})
    for name, parameter in gpt.named_parameters():
        if ".mlp." in name:
            parameter.data.fill_(7.0)
        if divided and name.endswith("linear_qkv.weight"):
            mark_parameter(parameter, ParameterClass.TENSOR)
            parameter.partition_dim = 0  # type: ignore[attr-defined]
    return gpt


def _drawn(gpt: nn.Module, tensor: int = 1, part: int = 0, seed: int = 3) -> dict[str, torch.Tensor]:
    draw_initial_values(gpt, MODEL, seed, tensor, part)
    return {name: parameter.detach() for name, parameter in gpt.named_parameters()}


def test_matrices_differ_by_name_and_seed_and_nothing_else_does() -> None:
    one, again, other = _drawn(_model()), _drawn(_model()), _drawn(_model(), seed=4)
    matrices = [name for name in one if name.endswith(("qkv.weight", "proj.weight"))]
    assert len(matrices) == 4
    assert len({one[name].sum().item() for name in matrices}) == 4
    for name, value in one.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (name not in matrices)
        if name.endswith(".bias") and ".mlp." not in name:
            assert not value.any()
        if ".mlp." in name:
            assert (value == 7).all()
    assert (one["norm.weight"] == 1).all()


def test_standard_deviations_are_those_of_the_configuration() -> None:
    drawn = _drawn(_model())
    for layer in range(2):
        of_layer = f"layers.{layer}.self_attention"
        assert drawn[f"{of_layer}.linear_qkv.weight"].std().item() == pytest.approx(0.5, rel=0.05)
        assert drawn[f"{of_layer}.linear_proj.weight"].std().item() == pytest.approx(0.5 / 4, rel=0.05)  # sqrt(2 x 8)


def test_tensor_parallel_parts_are_parts_of_the_whole() -> None:
    whole, parts = _drawn(_model()), [_drawn(_model(32, divided=True), 2, part) for part in range(2)]
    name = "layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
