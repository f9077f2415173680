"""Predicted seconds of a step's collectives beside the dispatch, and the bubble of pipeline stages.

Computation hides none of them. The bubble is that of the 1F1B schedule, interleaved or not.
"""

from moe_dist.config import BatchShape, RunConfig, WorldShape
from moe_dist.model.collective_bytes import attention_traffic, message_bytes
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.network import reduce_seconds


def attention_seconds(config: RunConfig, shape: WorldShape, batch: BatchShape, fabric: Fabric) -> float:
    """Return the seconds of attention's collectives for one micro-batch, on the last pipeline stage."""
    traffic, devices = attention_traffic(config, shape, batch), fabric.devices_per_node
    tensor_on_node = min(shape.tensor, devices)
    context_on_node = min(shape.context, max(1, devices // shape.tensor))
    return reduce_seconds(traffic.tensor, shape.tensor, tensor_on_node, fabric) + reduce_seconds(
        traffic.context, shape.context, context_on_node, fabric
    )


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
