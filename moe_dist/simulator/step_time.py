"""Predicted time of a training step by part.

    step = accumulation x layers of a stage x (attention and its collectives + busiest rank's experts + all-to-all)
           + accumulation x output layer + pipeline bubble and messages
           + gradient reduction + optimizer + re-clustering + overhead

The replicas of the expert-parallel group are independent within a step; the slowest one determines its end.

Shapes: D replicas, P ranks of a group, L distinct layers.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_dist.config import BatchShape, RunConfig, WorldShape, tokens_on_rank
from moe_dist.config.layer_kinds import residual_parameters
from moe_dist.config.token_work import work_of
from moe_dist.model.collective_bytes import muon_bytes, number_size, reduction_rounds
from moe_dist.moe.parameter_class import ParameterClass
from moe_dist.simulator import memory
from moe_dist.simulator.collective_seconds import attention_seconds, bubble, message_seconds
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.network import exchange_seconds, reduce_seconds
from moe_dist.simulator.popularity import Floats, balanced_clusters
from moe_dist.simulator.sizes import matrices_on_rank, parameters_on_rank
from moe_dist.simulator.strategies import Demand, Strategy, demand

FORWARD_EXCHANGES, BACKWARD_EXCHANGES = 3, 2  # counts, there, back; there and back again
OPTIMIZER_BYTES = 32  # read and written for a parameter: gradient, master, two moments
TRAINING_STATE_BYTES = 14  # of a moved parameter: weight in 16 bits, master and two moments in 32
LayerLoad = tuple[Floats, Floats, tuple[float, float]]
"""Load of one layer: rows_D, seconds_D of its exchanges, and bytes per token, all and between nodes."""
KnownLayers = dict[tuple[int | bool, ...], list[LayerLoad]]
"""Loads of the distinct layers by the shape of the groups and the tokens of a rank."""


@dataclass(frozen=True)
class Scenario:
    """Assumptions beyond the configuration.

    Attributes:
        recluster_every: steps between re-clusterings that keep clusters equally loaded; None: no re-clustering.
        resident: share of a rank's clusters that stay on the device; the others are fetched from the host.
        overlap: share of the all-to-all that is hidden behind computation.
        most_nodes: M of node-limited routing.
        drawn_replicas: largest number of replicas whose random loads are drawn.
        layers: number of layers with popularities of their own; their mean stands for all.
    """

    strategy: Strategy
    recluster_every: int | None = None
    resident: float = 1.0
    overlap: float = 0.0
    most_nodes: int = 4
    drawn_replicas: int = 10**6
    layers: int = 2
    seed: int = 0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, on the slowest replica; tokens of all ranks."""

    parts: dict[str, float]
    tokens: int
    useful_flops: float
    inter_node_bytes_per_token_layer: float
    bytes_per_token_layer: float
    device_flops: float = field(repr=False, default=0.0)

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return self.tokens / self.seconds

    @property
    def model_flops_utilisation(self) -> float:
        """FLOPs that the model needs over what all devices could do in the time."""
        return self.useful_flops / (self.seconds * self.device_flops)


def step_time(
    config: RunConfig,
    shape: WorldShape,
    batch: BatchShape,
    vocabulary: int,
    fabric: Fabric,
    popularity_LE: Floats,
    scenario: Scenario,
    known: KnownLayers | None = None,
) -> StepTime:
    """Predict one step.

    Args:
        popularity_LE: share of each expert in each distinct layer; further layers repeat them.
        known: layers of earlier predictions for the same model, machine and scenario, in any layout; extended.
    """
    tokens = tokens_on_rank(config, shape, batch)
    work, rate = work_of(config, vocabulary), fabric.compute_rate
    passes = 4 if config.model.activation_checkpointing else 3  # forward once or twice, backward twice the work
    layers = config.model.layers // shape.pipeline * batch.accumulation
    taken = _layers(config, shape, fabric, popularity_LE, scenario, tokens, {} if known is None else known)
    row = passes * work.row / (shape.shard if shape.sliced else 1)
    experts_D = row / fabric.expert_rate * np.mean([rows_D for rows_D, _, _ in taken], axis=0)
    wire_D = np.mean([seconds_D for _, seconds_D, _ in taken], axis=0)
    slowest = int(np.argmax(experts_D + wire_D))
    attention = passes * tokens * work.layer / rate
    passes_of_stage = {
        "attention and dense": layers * attention + batch.accumulation * passes * tokens * work.head / rate,
        "experts": layers * float(experts_D[slowest]),
        "all-to-all": layers * (1 - scenario.overlap) * float(wire_D[slowest]),
        "attention's collectives": batch.accumulation * attention_seconds(config, shape, batch, fabric),
        "offload": layers * _offload(config, shape, fabric, scenario, attention + float(experts_D[slowest])),
    }
    parts = {
        **passes_of_stage,
        "pipeline bubble": bubble(shape, batch) * sum(passes_of_stage.values()),
        "pipeline messages": message_seconds(config, shape, batch, fabric),
        "reduction": _reduction(config, shape, batch, vocabulary, fabric),
        "optimizer": _optimizer(config, shape, vocabulary, fabric),
        "re-clustering": _recluster(config, shape, fabric, popularity_LE, scenario),
        "overhead": fabric.device.step_overhead * fabric.sharing,
    }
    total, inter = np.mean([volume for _, _, volume in taken], axis=0)
    all_tokens = tokens * batch.accumulation * shape.stage_ranks
    useful = 3 * work.token(config.model.layers) * all_tokens
    return StepTime(parts, all_tokens, useful, inter, total, fabric.device.flops * shape.ranks)


def _layers(
    config: RunConfig,
    shape: WorldShape,
    fabric: Fabric,
    popularity_LE: Floats,
    scenario: Scenario,
    tokens: int,
    known: KnownLayers,
) -> list[LayerLoad]:
    """Return the loads of each distinct layer, from `known` where it has those of such groups."""
    key = (shape.data, shape.cluster, shape.shard, shape.replicas, shape.sliced, tokens)
    if key not in known:
        draw = np.random.default_rng(scenario.seed)
        count = min(scenario.layers, config.model.layers)
        known[key] = [
            _layer(config, shape, fabric, popularity_LE[i % len(popularity_LE)], scenario, tokens, draw)
            for i in range(count)
        ]
    return known[key]


def _layer(
    config: RunConfig,
    shape: WorldShape,
    fabric: Fabric,
    popularity_E: Floats,
    scenario: Scenario,
    tokens: int,
    draw: np.random.Generator,
) -> LayerLoad:
    """Return rows_D that determine a replica's time, seconds_D of exchanges, and bytes per token: all, between nodes.

    Rows are those of the busiest rank, or if devices share processors all rows divided by these, if that is more.
    """
    replicas = min(shape.data, scenario.drawn_replicas)
    if not config.moe.layer_kind.routed:
        return np.zeros(replicas), np.zeros(replicas), (0.0, 0.0)
    asked = demand(
        config,
        shape,
        scenario.strategy,
        popularity_E,
        draw,
        reclustered=scenario.recluster_every is not None,
        devices_per_node=fabric.devices_per_node,
        most_nodes=scenario.most_nodes,
    )
    mean_P = tokens * asked.work_P
    rows_DP = mean_P + np.sqrt(mean_P) * draw.standard_normal((replicas, len(mean_P)))
    exchanges = FORWARD_EXCHANGES + BACKWARD_EXCHANGES
    wire_D = np.zeros(replicas)
    for flow in asked.flows:
        sent_PP = flow.bytes(tokens)
        wire_D = wire_D + exchange_seconds(sent_PP, flow.hop.row_bytes / 2, replicas, fabric, exchanges, draw)
    rows_D = np.maximum(rows_DP.max(axis=1), fabric.sharing * rows_DP.mean(axis=1))
    return rows_D, wire_D, _volumes(asked, fabric, tokens)


def _volumes(asked: Demand, fabric: Fabric, tokens: int) -> tuple[float, float]:
    """Return bytes per token, all and between nodes, for a group that starts on a node's first device."""
    total = inter = 0.0
    for flow in asked.flows:
        sent_PP = flow.bytes(tokens)
        node_P = np.arange(len(sent_PP)) // fabric.devices_per_node
        total += float(sent_PP.sum()) / len(sent_PP) / tokens
        inter += float(sent_PP[node_P[:, None] != node_P].sum()) / len(sent_PP) / tokens
    return total, inter


def _offload(config: RunConfig, shape: WorldShape, fabric: Fabric, scenario: Scenario, compute: float) -> float:
    """Return the seconds per layer by which fetching offloaded clusters exceeds the computation, in both passes."""
    if not config.moe.layer_kind.clustered:
        return 0.0
    held = parameters_on_rank(config, shape, 0)
    bytes_layer = 2.0 * (held[ParameterClass.BASE] + held[ParameterClass.EXPERT]) * shape.pipeline / config.model.layers
    return max(0.0, 2 * (1 - scenario.resident) * bytes_layer / fabric.device.host_bandwidth - compute)


def _reduction(config: RunConfig, shape: WorldShape, batch: BatchShape, vocabulary: int, fabric: Fabric) -> float:
    held, around = parameters_on_rank(config, shape, vocabulary), reduction_rounds(config, batch) * number_size(config)
    of_muon = matrices_on_rank(config, shape) if config.optimizer.kind == "muon" else {}
    seconds = 0.0
    for kind, sharing in memory.replicas(shape).items():
        matrices = of_muon.get(kind, 0)
        size = around * (held[kind] - matrices) + muon_bytes(config) * matrices
        seconds += reduce_seconds(size, sharing, _on_node(kind, shape, fabric), fabric) if size else 0.0
    return seconds


def _on_node(kind: ParameterClass, shape: WorldShape, fabric: Fabric) -> int:
    """Return the number of ranks of one node that hold copies of the same parameters."""
    devices = fabric.devices_per_node
    if kind is ParameterClass.DENSE:
        return min(devices, shape.stage_ranks)
    if kind is ParameterClass.TENSOR:
        return max(1, devices // shape.tensor)
    replicas = max(1, devices // (shape.cluster * shape.shard))
    return replicas * (min(shape.shard, devices) if kind is ParameterClass.BASE else 1)


def _optimizer(config: RunConfig, shape: WorldShape, vocabulary: int, fabric: Fabric) -> float:
    held = parameters_on_rank(config, shape, vocabulary)
    own = sum(held[kind] / (n if config.world.zero_stage else 1) for kind, n in memory.replicas(shape).items())
    return OPTIMIZER_BYTES * own / fabric.device.memory_bandwidth * fabric.sharing


def _recluster(
    config: RunConfig, shape: WorldShape, fabric: Fabric, popularity_LE: Floats, scenario: Scenario
) -> float:
    """Return the seconds per step of moving experts to their balanced clusters every `recluster_every` steps.

    A mover has its factors, vectors and their training state; the busiest block of ranks counts, in and out.
    """
    if scenario.recluster_every is None or not config.moe.layer_kind.clustered or shape.cluster == 1:
        return 0.0
    moe, per_block = config.moe, config.moe.clusters // shape.cluster
    busiest = []
    for popularity_E in popularity_LE:
        before_E = np.arange(moe.experts) // moe.experts_per_cluster // per_block
        after_E = balanced_clusters(popularity_E, moe.clusters) // per_block
        moved_E = before_E != after_E
        leaving_B = np.bincount(before_E[moved_E], minlength=shape.cluster)
        arriving_B = np.bincount(after_E[moved_E], minlength=shape.cluster)
        busiest.append(max(leaving_B.max(), arriving_B.max()))
    experts = float(np.mean(busiest)) * config.model.layers / shape.shard
    moved = experts * residual_parameters(config.model.hidden_size, moe) * TRAINING_STATE_BYTES
    rate = fabric.node_bandwidth if shape.cluster * shape.shard <= fabric.devices_per_node else fabric.rail_bandwidth
    return moved / rate / scenario.recluster_every
