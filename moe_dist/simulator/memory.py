"""Predicted memory of one rank: weights, gradients, optimizer, activations.

Weights, gradients and optimizer are counted from shapes and ZeRO's rules. The tensors that the backward pass needs of a
layer were counted on the running model (torch 2.13, megatron-core 0.16) by its saved tensors; they are linear in the
widths, and the tests count again.
"""

from dataclasses import dataclass, fields

from moe_dist.config import BatchShape, RunConfig, WorldShape, tokens_on_rank
from moe_dist.config.byte_sizes import FLOAT32, MOMENTS
from moe_dist.config.layer_kinds import factor_parameters
from moe_dist.moe.parameter_class import ParameterClass
from moe_dist.simulator.sizes import matrices_on_rank, parameters_on_rank


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind."""

    dense_weights: float
    base_weights: float
    expert_weights: float
    gradients: float
    optimizer: float
    activations: float
    output_layer: float

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def replicas(shape: WorldShape) -> dict[ParameterClass, int]:
    """Return the number of ranks that share the optimizer state of each class under ZeRO."""
    return {
        ParameterClass.DENSE: shape.stage_ranks,
        ParameterClass.TENSOR: shape.stage_ranks // shape.tensor,
        ParameterClass.BASE: shape.data * shape.shard,
        ParameterClass.EXPERT: shape.data,
    }


def memory_of_rank(config: RunConfig, shape: WorldShape, batch: BatchShape, vocabulary: int) -> Memory:
    """Predict the bytes at the peak of a step, just before the first gradients, on the fullest pipeline stage.

    It is the first stage, which has the embedding and keeps the most micro-batches, or the last one, with the logits.
    """
    ends = {0, shape.pipeline - 1}
    return max((memory_of_stage(config, shape, batch, vocabulary, stage) for stage in ends), key=lambda m: m.total)


def memory_of_stage(config: RunConfig, shape: WorldShape, batch: BatchShape, vocabulary: int, at: int) -> Memory:
    """Predict these bytes on a rank of one pipeline stage."""
    held = parameters_on_rank(config, shape, vocabulary, at)
    stage, half = config.world.zero_stage, config.train.precision != "float32"
    size = 2 if half else FLOAT32
    masters = FLOAT32 if half or stage > 0 else 0
    gradients = optimizer = 0.0
    for kind, sharing in replicas(shape).items():
        gradients += size * held[kind] / (sharing if stage >= 2 else 1)
        optimizer += (masters + MOMENTS) * held[kind] / (sharing if stage >= 1 else 1)
    for kind, matrices in matrices_on_rank(config, shape).items() if config.optimizer.kind == "muon" else ():
        share = matrices / (replicas(shape)[kind] if stage >= 1 else 1)
        gradients += size * (matrices - share) if stage >= 2 else 0  # reduced whole
        optimizer -= share * (MOMENTS / 2 + (0 if half else masters))
    factors, codes = packed_factors(config, shape)
    gradients += size * factors * (1 - 1 / (shape.data if stage >= 2 else 1))  # reduced whole
    optimizer -= masters * factors / (shape.data if stage >= 1 else 1)
    tokens = tokens_on_rank(config, shape, batch)
    layers, last = config.model.layers // shape.pipeline, at == shape.pipeline - 1
    rows_of_others = config.moe.top_clusters * (shape.shard - 1 if shape.sliced else 0)
    needed = saved_elements(config) + 2 * rows_of_others * config.model.hidden_size  # their inputs and outputs
    saved = tokens * bytes_an_element(config) * needed
    if config.model.activation_checkpointing:
        saved += (layers - 1) * tokens * size * config.model.hidden_size  # one layer whole, of the others the input
    else:
        saved *= layers
    saved *= micro_batches_in_flight(shape, batch, at)
    copy = 2 * size * vocabulary // shape.tensor * config.model.hidden_size  # of a tied embedding, and its gradient
    return Memory(
        size * (held[ParameterClass.DENSE] + held[ParameterClass.TENSOR]),
        size * held[ParameterClass.BASE],
        size * held[ParameterClass.EXPERT] + codes,
        gradients,
        optimizer,
        saved,
        last * 3 * FLOAT32 * tokens * vocabulary  # logits, their softmax, their gradient
        + (last and shape.pipeline > 1 and config.model.tie_embeddings) * copy,
    )


def micro_batches_in_flight(shape: WorldShape, batch: BatchShape, stage: int) -> float:
    """Return the micro-batches whose activations a stage keeps at most, as parts of its layers (1F1B, interleaved)."""
    if shape.chunks == 1:
        return min(batch.accumulation, shape.pipeline - stage)
    passes = 2 * (shape.pipeline - stage - 1) + (shape.chunks - 1) * shape.pipeline + 1
    return min(batch.accumulation * shape.chunks, passes) / shape.chunks


def packed_factors(config: RunConfig, shape: WorldShape) -> tuple[int, float]:
    """Return the factors of a rank that are trained quantized, and the bytes of their codes and scales.

    A dequantized copy is in use beside the codes, from the forward to the backward pass.
    """
    moe, precision = config.moe, config.precision
    if precision.residuals != "packed":
        return 0, 0.0
    layers = config.model.layers // shape.pipeline
    experts = layers * (moe.clusters // shape.cluster) * (moe.experts_per_cluster // shape.shard)
    d, f, size = config.model.hidden_size, moe.expert_hidden, precision.group_size
    scales = 3 * moe.rank * (-(-d // size) + -(-f // size))  # components of six factors, by their long axes
    factors = factor_parameters(d, moe)
    return experts * factors, experts * (factors * precision.bits / 8 + 2 * scales)


def bytes_an_element(config: RunConfig) -> float:
    """Return float32 numbers that bfloat16 training saves too: norms, rotary positions, the router and gates."""
    if config.train.precision == "float32":
        return FLOAT32
    return 2.8 if config.moe.layer_kind.clustered else 2.45


def saved_elements(config: RunConfig) -> float:
    """Return the numbers that the backward pass of one layer needs, per token of the rank."""
    d, moe = config.model.hidden_size, config.moe
    return 12.5 * d + moe.layer_kind.saved_elements(d, moe)  # attention, and the feed-forward layer
