"""Predicted cost of pipeline stages: messages between them, and the bubble of the 1F1B schedule, interleaved or not."""

from moe_dist.config import BatchShape, RunConfig, WorldShape
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.sizes import tokens_on_rank


def message_bytes(config: RunConfig, shape: WorldShape, batch: BatchShape) -> int:
    """Return the bytes of the hidden states of a micro-batch that a rank sends to the next stage."""
    size = 4 if config.train.precision == "float32" else 2
    return tokens_on_rank(config, shape, batch) * config.model.hidden_size * size


def step_bytes(config: RunConfig, shape: WorldShape, batch: BatchShape, vocabulary: int) -> int:
    """Return the bytes that all ranks send to other stages in a step: hidden states, gradients, and a tied embedding.

    The embedding goes to the last stage, and its gradient back.
    """
    if shape.pipeline == 1:
        return 0
    crossings = (shape.pipeline * shape.chunks - 1) * batch.accumulation
    passes = 2 * crossings * shape.stage_ranks * message_bytes(config, shape, batch)
    size = 4 if config.train.precision == "float32" else 2
    embedding = size * vocabulary // shape.tensor * config.model.hidden_size if config.model.tie_embeddings else 0
    return passes + 2 * shape.stage_ranks * embedding


def message_seconds(config: RunConfig, shape: WorldShape, batch: BatchShape, fabric: Fabric) -> float:
    """Return the seconds of a stage's messages in a step, each chunk's forward and backward; none are hidden."""
    if shape.pipeline == 1:
        return 0.0
    inside = shape.ranks <= fabric.devices_per_node
    bandwidth = fabric.node_bandwidth if inside else fabric.rail_bandwidth
    return 2 * shape.chunks * batch.accumulation * message_bytes(config, shape, batch) / bandwidth


def bubble(shape: WorldShape, batch: BatchShape) -> float:
    """Return the time in which a stage waits for others, per time of its own passes (Narayanan et al. 2021)."""
    return (shape.pipeline - 1) / (shape.chunks * batch.accumulation)
