"""The simulator's bytes of divided attention against the collectives that are issued, on two ranks."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings

from moe_dist.config import BatchShape, WorldShape, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.model.language_model import LanguageModel
from moe_dist.simulator.attention_traffic import AttentionTraffic, attention_seconds, attention_traffic
from moe_dist.simulator.hardware import Fabric, device_named
from tests.distributed.ranks import run_ranks

VOCABULARY = 96
SMALL = [
    "moe.kind=dense", "model.hidden_size=64", "model.heads=4", "model.layers=3", "model.sequence_length=16",
    "moe.expert_hidden=64", "train.precision=float32",
]  # fmt: skip
CASES = [
    ["world.tensor=2"],
    ["world.tensor=2", "model.activation_checkpointing=true", "model.kv_heads=2", "model.tie_embeddings=false"],
    ["world.context=2"],
    ["world.context=2", "model.activation_checkpointing=true", "model.kv_heads=2"],
    ["world.context=2", "model.kv_heads=1"],
]


def _shape(words: list[str]) -> WorldShape:
    world = load_config(None, [*SMALL, *words]).world
    return WorldShape(2, 1, 1, tensor=world.tensor, context=world.context)


def _carried(cases: list[list[str]]) -> list[tuple[int, int]]:
    return [_carried_by(words) for words in cases]


def _carried_by(words: list[str]) -> tuple[int, int]:
    """Bytes of the whole tensors that are gathered or scattered, and of those that are exchanged."""
    config, counted = load_config(None, [*SMALL, *words]), {"around": 0, "exchanged": 0}
    process = init_distributed(config.world)
    mesh = Mesh.create(_shape(words), process.timeout)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device))

    def counting(function: Any, kind: str, whole: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[kind] += args[whole].numel() * args[whole].element_size()
            return function(*args, **kwargs)

        return call

    gather, scatter, exchange = dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_to_all_single
    with (
        mock.patch.object(layers, "dist_all_gather_func", counting(gather, "around", 0)),
        mock.patch.object(mappings, "dist_all_gather_func", counting(gather, "around", 0)),
        mock.patch.object(layers, "dist_reduce_scatter_func", counting(scatter, "around", 1)),
        mock.patch.object(mappings, "dist_reduce_scatter_func", counting(scatter, "around", 1)),
        mock.patch.object(dist, "all_to_all_single", counting(exchange, "exchanged", 0)),
    ):
        model(torch.randint(VOCABULARY, (2, 17))).backward()
    return counted["around"], counted["exchanged"]


def test_as_many_bytes_are_carried_as_predicted() -> None:
    for outcomes in run_ranks(_carried, 2, CASES):
        for words, carried in zip(CASES, outcomes, strict=True):
            predicted = attention_traffic(load_config(None, [*SMALL, *words]), _shape(words), BatchShape(2, 1))
            assert AttentionTraffic(*carried) == predicted, words


def test_seconds_are_those_of_the_slowest_link_of_a_group() -> None:
    config = load_config(None, [*SMALL, "world.tensor=2"])
    fabric = Fabric(device_named("h100"), nodes=2, devices_per_node=1, rails=1, pod_nodes=2)
    one = 2 * 16 * 64 * 4 / 2 / fabric.rail_bandwidth  # two sequences of 16 tokens, half of them from the other node
    shape = WorldShape(2, 1, 1, tensor=2)
    assert attention_seconds(config, shape, BatchShape(2, 1), fabric) == pytest.approx((3 + 1) * 5 * one)
    assert attention_seconds(config, WorldShape(2, 1, 1), BatchShape(2, 1), fabric) == 0
