"""Formulas for parameters, FLOPs and memory against the model itself."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.config import BatchShape, RunConfig, WorldShape, load_config
from moe_dist.config.token_work import work_of
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Coordinates, Mesh, RankGroup, group_layout, rank_at
from moe_dist.model import language_model
from moe_dist.model import megatron_backbone as megatron_gpt
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.parameter_class import ParameterClass, class_of
from moe_dist.simulator.memory import bytes_an_element, memory_of_rank, replicas, saved_elements
from moe_dist.simulator.sizes import parameters_on_rank
from tests.distributed.ranks import run_ranks

VOCABULARY = 96
SMALL = [
    "model.hidden_size=32", "model.heads=4", "model.sequence_length=16", "moe.experts=16", "moe.clusters=4",
    "moe.expert_hidden=48", "moe.rank=2", "train.precision=float32", "model.layers=2", "moe.backend=masked",
]  # fmt: skip
KINDS = [
    ["moe.kind=clustered"],
    ["moe.kind=clustered", "moe.expert_vectors=false", "model.tie_embeddings=false"],
    ["moe.shared_expert_hidden=24", "moe.shared_expert_gate=true", "model.head_dim=6", "model.qkv_bias=true"],
    ["moe.kind=standard", "moe.shared_expert_hidden=24", "model.kv_heads=2"],
    ["moe.kind=dense", "model.kv_heads=2", "model.head_dim=6", "model.qk_norm=head"],
    ["moe.kind=dense", "model.kv_heads=2", "model.qk_norm=width"],
    ["moe.kind=dense"],
]


def _mesh(shape: WorldShape) -> Mesh:
    """Rank 0's mesh without process groups: enough to build a model."""
    first = rank_at(shape, Coordinates(0, 0, 0))
    groups = {kind: RankGroup(kind, ranks, None) for kind, ranks in group_layout(shape) if first in ranks}
    return Mesh(shape, first, groups)


def _model_and_formulas(words: list[list[str]], shapes: list[WorldShape]) -> None:
    megatron_gpt.initialize_megatron(60, 1)
    with mock.patch.object(language_model, "initialize_megatron"):  # which would look for the other ranks
        _compare_parameters(words, shapes)


def _compare_parameters(words: list[list[str]], shapes: list[WorldShape]) -> None:
    for more in words:
        config = load_config(None, [*SMALL, *more])
        for shape in shapes:
            if config.moe.kind == "dense" and shape.cluster * shape.shard > 1:
                continue
            model = LanguageModel(config, VOCABULARY, _mesh(shape), Links.alone())
            held = dict.fromkeys(ParameterClass, 0)
            for parameter in model.parameters():
                held[class_of(parameter)] += parameter.numel()
            assert held == parameters_on_rank(config, shape, VOCABULARY), f"{more}, {shape}"


def test_parameters_are_those_of_the_model() -> None:
    shapes = [WorldShape(1, 1, 1), WorldShape(1, 2, 1), WorldShape(2, 4, 1), WorldShape(1, 2, 2), WorldShape(1, 1, 4)]
    run_ranks(_model_and_formulas, 1, KINDS, shapes)


def _flops(variants: list[list[str]]) -> list[tuple[float, float]]:
    found = []
    for words in variants:
        config = load_config(None, [*SMALL, *words, "model.hidden_size=128", "moe.expert_hidden=256"])
        model = LanguageModel(config, VOCABULARY, Mesh.alone(), Links.alone())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(4, 17, dtype=torch.int64))
        found.append((counter.get_total_flops() / 64, work_of(config, VOCABULARY).token(2)))
    return found


def test_flops_are_those_that_torch_counts() -> None:
    variants = [*KINDS[3:], ["moe.kind=clustered", "moe.backend=sorted", "moe.rank=8"]]
    (found,) = run_ranks(_flops, 1, variants)
    for words, (counted, formula) in zip(variants, found, strict=True):
        assert formula == pytest.approx(counted, rel=0.05), words


ACTIVATIONS = [
    ["moe.kind=dense"],
    ["moe.kind=standard", "moe.top_k=4"],
    ["moe.top_k=1"],
    ["moe.top_k=4"],
    ["moe.top_clusters=2"],
    ["moe.kind=standard", "train.precision=bfloat16"],
    ["moe.top_k=2", "train.precision=bfloat16"],
]


def _saved(variants: list[list[str]]) -> list[tuple[float, float]]:
    """Bytes a token that three layers keep beyond two for the backward pass, and the formula's."""
    found = []
    for words in variants:
        more = [*SMALL, *words, "model.hidden_size=128", "moe.expert_hidden=192"]
        two, three = (load_config(None, [*more, f"model.layers={layers}"]) for layers in (2, 3))
        kept = (_bytes_kept(three) - _bytes_kept(two)) / (2 * 16)
        found.append((kept, saved_elements(two) * bytes_an_element(two)))
    return found


def _bytes_kept(config: RunConfig) -> int:
    torch.manual_seed(0)
    model = LanguageModel(config, VOCABULARY, Mesh.alone(), Links.alone())
    model.to(getattr(torch, config.train.precision))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Tensor] = {}  # the tensors too: a storage that is gone could have its address again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(VOCABULARY, (2, 17)))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_activations_are_what_the_backward_pass_keeps() -> None:
    (found,) = run_ranks(_saved, 1, ACTIVATIONS)
    for words, (kept, formula) in zip(ACTIVATIONS, found, strict=True):
        assert formula == pytest.approx(kept, rel=0.12), words


def test_zero_divides_what_it_says() -> None:
    config = load_config(None, [*SMALL, "train.precision=bfloat16", "world.zero_stage=0"])
    shape, batch = WorldShape(2, 2, 2), BatchShape(1, 1)
    zero = {
        stage: memory_of_rank(
            config.model_copy(update={"world": config.world.model_copy(update={"zero_stage": stage})}),
            shape,
            batch,
            VOCABULARY,
        )
        for stage in (0, 1, 2)
    }
    held, sharing = parameters_on_rank(config, shape, VOCABULARY), replicas(shape)
    none_divided = {ParameterClass.TENSOR: 8}
    assert sharing == {ParameterClass.DENSE: 8, ParameterClass.BASE: 4, ParameterClass.EXPERT: 2, **none_divided}
    assert zero[0].optimizer == 12 * sum(held.values())
    assert zero[1].optimizer == zero[2].optimizer == sum(12 * held[kind] / n for kind, n in sharing.items())
    assert zero[0].gradients == zero[1].gradients == 2 * sum(held.values()) > zero[2].gradients
    assert zero[1].total == pytest.approx(sum(vars(zero[1]).values()))
