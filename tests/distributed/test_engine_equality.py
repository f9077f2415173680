"""One rank and N ranks train alike: same losses, gradient norms, updated weights and biases, for any layout."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import RunConfig, WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.standard_moe import StandardMoE
from tests.distributed.ranks import run_ranks

STEPS, SEQUENCES, VOCABULARY = 5, 8, 98
SHAPES: list[tuple[int, ...]] = [
    (1, 2, 1),
    (2, 1, 1),
    (1, 1, 2),
    (1, 4, 1),
    (2, 2, 1),
    (1, 2, 2),
    (2, 1, 2),
    (2, 2, 1, 2),
    (1, 2, 1, 1, 2, 1),
    (2, 1, 1, 1, 1, 2),
    (1, 4, 1, 1, 2, 2),
    (2, 2, 1, 1, 2, 1),
    (2, 2, 1, 2, 1, 4),
]
"""data, cluster, shard, replicas on neighboring ranks, tensor and context."""
pytestmark = pytest.mark.timeout(400)
SMALL = [
    "model.hidden_size=32", "model.heads=4", "model.sequence_length=16", "moe.experts=16", "moe.clusters=4",
    "moe.expert_hidden=16", "moe.rank=2", "moe.wire_dtype=float32", "train.precision=float32",
    f"train.global_batch_size={SEQUENCES}", "train.micro_batch_size=1", "optimizer.clip_norm=0.5",
    "optimizer.learning_rate=1e-3",
    "optimizer.feed_forward_lr_scale=0.5",
]  # fmt: skip


@dataclass
class Trained:
    """What a run leaves on one rank, weights under names that do not depend on the layout."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: list[Tensor] = field(default_factory=list)


def _train(axes: tuple[int, ...], variants: list[list[str]]) -> list[Trained]:
    shape = WorldShape(*axes)  # type: ignore[arg-type]
    layout = [f"world.{axis}={getattr(shape, axis)}" for axis in ("tensor", "context", "pipeline")]
    layout.append(f"world.virtual_pipeline={shape.chunks}")
    return [_train_variant(shape, load_config(None, [*SMALL, *layout, *words])) for words in variants]


def _train_variant(shape: WorldShape, config: RunConfig, before: Callable[..., None] = lambda *_: None) -> Trained:
    """Train a few steps; `before` is called before each with the engine, its number, and this rank's sequences."""
    process = init_distributed(config.world)
    mesh = Mesh.create(shape, timedelta(seconds=60))
    batch = resolve_batch(config, process.ranks)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    engine, trained = DeepSpeedEngine(model, config, batch, process), Trained()
    data = torch.randint(VOCABULARY, (STEPS, SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    share, group = SEQUENCES // shape.sequence_groups, mesh.in_attention.group
    for step in range(STEPS):
        sequences_BS = data[step, group * share : (group + 1) * share]
        before(engine, step, sequences_BS)
        outcome = engine.forward_backward(sequences_BS)
        assert not outcome.broken_ranks
        trained.losses.append(outcome.loss)
        trained.norms.append(engine.update(outcome, config.optimizer.learning_rate))
    trained.weights = {name: value.clone() for name, value in _weights_by_global_name(model).items()}
    trained.biases = [model.context.balance.cluster_bias_LG, model.context.balance.expert_bias_LE]
    return trained


def _weights_by_global_name(model: LanguageModel) -> dict[str, Tensor]:
    """Clusters and experts under their own numbers, whatever local module or slot holds them."""
    held: dict[str, Tensor] = {}
    mesh = model.context.mesh
    names = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if ".clusters." in name:
            layer, _, rest = name.partition(".clusters.")
            local, _, leaf = rest.partition(".")
            moe = names[layer]
            assert isinstance(moe, ClusteredMoE)
            placement = moe.placement
            cluster = placement.clusters_of_block(mesh.at.cluster)[int(local)]
            part = names[f"{layer}.clusters.{local}"]
            assert isinstance(part, ClusteredExperts)
            if leaf.startswith("residuals"):
                packed, own = part.residuals.packed, leaf.partition(".")[2]
                values = parameter if packed is None or own not in packed.factors else packed.read(own)
                for expert, value in zip(placement.experts_of(cluster, mesh.at.shard), values, strict=True):
                    held[f"{layer}.expert {expert}.{leaf}"] = value.detach()
            else:
                held[f"{layer}.cluster {cluster}.{leaf}"] = parameter.detach()
        elif ".experts." in name:
            layer, _, leaf = name.partition(".experts.")
            moe = names[layer]
            assert isinstance(moe, StandardMoE)
            kind, _, index = leaf.rpartition(".")
            held[f"{layer}.expert {moe.first_expert + int(index)}.{kind}"] = parameter.detach()
        else:
            held[f"{owner}.{name}"] = _whole(parameter.detach(), parameter, mesh)
    return held


def _whole(value: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """The parts of a tensor-parallel parameter beside each other, as one rank holds it."""
    if mesh.shape.tensor == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return value
    group = mesh.group(GroupKind.TENSOR)
    parts = [torch.empty_like(value) for _ in group.ranks]
    dist.all_gather(parts, value.contiguous(), group=group.handle)
    return torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]


CLUSTERED = [
    ["moe.top_clusters=1", "world.zero_stage=0"],
    ["moe.top_clusters=1", "world.zero_stage=1"],
    ["moe.top_clusters=1", "world.zero_stage=2"],
    ["moe.top_clusters=2", "world.zero_stage=1", "moe.shared_init=true", "moe.gate_scale=3"],
    ["moe.top_clusters=3", "moe.top_k=1", "moe.expert_vectors=false", "world.zero_stage=1"],
    ["moe.top_clusters=1", "world.zero_stage=1", "model.activation_checkpointing=true", "moe.overlap_chunks=2"],
    ["moe.top_clusters=1", "moe.top_k=1", "world.zero_stage=1", "moe.z_loss_weight=0.01"],
    ["moe.top_clusters=2", "moe.top_k=1", "world.zero_stage=2", "moe.z_loss_weight=0.01", "moe.overlap_chunks=3"],
    ["moe.top_clusters=1", "world.zero_stage=1", "moe.base=shared+cluster", "moe.base_rank=3"],
    ["precision.residuals=packed", "world.zero_stage=0"],
    ["precision.residuals=packed", "world.zero_stage=2", "moe.top_clusters=2", "model.activation_checkpointing=true"],
]
OTHERS = [
    ["moe.kind=standard", "world.zero_stage=0"],
    [
        "moe.kind=standard", "world.zero_stage=1", "moe.shared_expert_hidden=8", "model.tie_embeddings=false",
        "model.kv_heads=2",
    ],
    ["moe.kind=standard", "world.zero_stage=2", "moe.top_k=1"],
    ["moe.kind=dense", "world.zero_stage=1"],
]  # fmt: skip
VARIANTS = CLUSTERED + OTHERS
OF_DIVIDED_ATTENTION = [CLUSTERED[0], CLUSTERED[2], CLUSTERED[3], CLUSTERED[5], OTHERS[1], OTHERS[3]]


@cache
def _reference() -> list[Trained]:
    (trained,) = run_ranks(_train, 1, (1, 1, 1), VARIANTS, timeout=180)
    return list(trained)


@pytest.mark.parametrize("axes", SHAPES, ids=str)
def test_any_layout_trains_like_one_rank(axes: tuple[int, ...]) -> None:
    ranks, half = axes[0] * axes[1] * axes[2], SHAPES.index(axes) % 2  # each variant is in every second layout
    variants = VARIANTS[half::2] if len(axes) < 6 else OF_DIVIDED_ATTENTION
    outcomes = run_ranks(_train, ranks, axes, variants, timeout=180)
    for number, words in enumerate(variants):
        expected = _reference()[VARIANTS.index(words)]
        assert all(norm > 0.5 for norm in expected.norms), "the clipping must act, or it is not tested"
        seen: set[str] = set()
        for rank in range(ranks):
            _assert_alike(outcomes[rank][number], expected, f"{words}, rank {rank}")
            seen |= set(outcomes[rank][number].weights)
        assert seen == set(expected.weights), f"{words}: every weight must be held by some rank"


def _assert_alike(trained: Trained, expected: Trained, where: str) -> None:
    assert trained.losses == pytest.approx(expected.losses, rel=1e-5), where
    assert trained.norms == pytest.approx(expected.norms, rel=1e-4), where
    for name, value in trained.weights.items():
        _assert_close(value, expected.weights[name], 1e-5, f"{where}, {name}")
    for bias, expected_bias in zip(trained.biases, expected.biases, strict=True):
        _assert_close(bias, expected_bias, 1e-6, f"{where}, biases")


def _assert_close(value: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=tolerance, msg=lambda text: f"{what}: {text}")


def test_stages_and_recomputation_agree_on_one_rank() -> None:
    reference = dict(zip(map(tuple, VARIANTS), _reference(), strict=True))
    plain, *same = [reference[tuple(words)] for words in (CLUSTERED[1], CLUSTERED[0], CLUSTERED[2], CLUSTERED[5])]
    for other in same:
        _assert_alike(other, plain, "ZeRO stage or recomputation")


def _train_plainly(words: list[str]) -> Trained:
    """The same steps with nothing but torch: one process, one AdamW, torch's own clipping."""
    config = load_config(None, [*SMALL, *words])
    process = init_distributed(config.world)
    mesh = Mesh.create(WorldShape(1, 1, 1), timedelta(seconds=60))
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), SEQUENCES)
    options, trained = config.optimizer, Trained()
    decayed: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    routers: list[torch.nn.Parameter] = []
    full: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        vector = parameter.ndim == 1 or leaf in ("hidden_gate_NF", "hidden_bias_NH", "output_bias_ND")
        if ".router." in name:
            routers.append(parameter)
        elif {"w_in", "w_out", "w_in_DH", "w_out_FD"} & set(name.split(".")):
            full.append(parameter)
        else:
            decayed[not vector and "embedding" not in name].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed[True], "weight_decay": options.weight_decay},
        {"params": decayed[False]},
        {
            "params": full,
            "weight_decay": options.weight_decay,
            "lr": options.learning_rate * options.feed_forward_lr_scale,
        },
        {
            "params": routers,
            "weight_decay": options.weight_decay,
            "lr": options.learning_rate * options.router_lr_scale,
        },
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        options.learning_rate,
        (options.beta1, options.beta2),
        options.epsilon,
        weight_decay=0.0,
    )
    data = torch.randint(VOCABULARY, (STEPS, SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        adamw.zero_grad()
        losses = [model(sequence[None]) / SEQUENCES for sequence in data[step]]
        for loss in losses:
            loss.backward()
        trained.losses.append(sum(float(loss.detach()) for loss in losses))
        trained.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)))
        adamw.step()
        balance = model.context.balance
        if config.moe.kind != "dense":
            balance.update(balance.count_LE, model.context.placements)
        balance.count_LE.zero_()
    trained.weights = {name: value.clone() for name, value in _weights_by_global_name(model).items()}
    trained.biases = [model.context.balance.cluster_bias_LG, model.context.balance.expert_bias_LE]
    return trained


def _train_all_plainly(variants: list[list[str]]) -> list[Trained]:
    return [_train_plainly(words) for words in variants]


def test_the_engine_does_what_plain_torch_does() -> None:
    variants = [words for words in VARIANTS if "precision.residuals=packed" not in words]
    (plain,) = run_ranks(_train_all_plainly, 1, variants)
    for words, expected in zip(variants, plain, strict=True):
        trained = _reference()[VARIANTS.index(words)]
        _assert_alike(trained, expected, f"{words} against plain torch")


def test_every_weight_is_trained() -> None:
    (started,) = run_ranks(_initial_weights, 1, VARIANTS)
    for words, before, trained in zip(VARIANTS, started, _reference(), strict=True):
        still = [name for name, value in trained.weights.items() if torch.equal(value, before[name])]
        assert not still, f"{words}: {still}"


def _initial_weights(variants: list[list[str]]) -> list[dict[str, Tensor]]:
    weights = []
    for words in variants:
        config = load_config(None, [*SMALL, *words])
        process = init_distributed(config.world)
        mesh = Mesh.create(WorldShape(1, 1, 1), timedelta(seconds=60))
        model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device))
        weights.append({name: value.clone() for name, value in _weights_by_global_name(model).items()})
    return weights
