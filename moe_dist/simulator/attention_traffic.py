"""Predicted traffic of attention that is divided over ranks: tensor, sequence and context parallelism.

Megatron-core gathers the tokens of a tensor group before a divided matrix and scatters sums behind one. Forward, a
layer gathers once and scatters once; backward, it gathers twice (its input again, and the output's gradient) and
scatters once. The embedding and the output layer together are like one more layer. Ulysses' all-to-alls send queries,
keys, values and outputs once forward, and their gradients once backward. With pipeline stages the first one has the two
passes of the embedding, the last one the three of the output layer. Sums of the cross-entropy, a few bytes a
token, are left out.
"""

from dataclasses import dataclass

from moe_dist.config import BatchShape, RunConfig, WorldShape
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.network import reduce_seconds

FORWARD_PASSES, BACKWARD_PASSES = 2, 3
PASSES_OF_OUTPUT_LAYER = 3


@dataclass(frozen=True)
class AttentionTraffic:
    """Bytes of one micro-batch's passes that go around a group, of which each of n ranks sends (n-1)/n.

    Attributes:
        tensor: gathered and scattered in the tensor group, forward and backward.
        context: exchanged in the context group.
    """

    tensor: float
    context: float


def attention_traffic(config: RunConfig, shape: WorldShape, batch: BatchShape) -> AttentionTraffic:
    """Return the bytes of the forward and backward passes of a micro-batch; with pipeline stages, of the last one."""
    model, size = config.model, 4 if config.train.precision == "float32" else 2
    tokens = batch.micro * model.sequence_length // shape.context
    forwards = 2 if model.activation_checkpointing else 1
    passes = forwards * FORWARD_PASSES + BACKWARD_PASSES
    ends = FORWARD_PASSES + BACKWARD_PASSES if shape.pipeline == 1 else PASSES_OF_OUTPUT_LAYER
    layers = model.layers // shape.pipeline
    keys = model.kv_heads or model.heads
    if keys // shape.tensor % shape.context:
        keys = model.heads  # they are repeated for each head of queries
    widths = 2 * (model.heads + keys) * model.head_width // shape.tensor
    return AttentionTraffic(
        tensor=(layers * passes + ends) * tokens * model.hidden_size * size if shape.tensor > 1 else 0,
        context=layers * (forwards + 1) * tokens * widths * size if shape.context > 1 else 0,
    )


def attention_seconds(config: RunConfig, shape: WorldShape, batch: BatchShape, fabric: Fabric) -> float:
    """Return the seconds of these collectives for one micro-batch; computation hides none of them."""
    traffic, devices = attention_traffic(config, shape, batch), fabric.devices_per_node
    tensor_on_node = min(shape.tensor, devices)
    context_on_node = min(shape.context, max(1, devices // shape.tensor))
    return reduce_seconds(traffic.tensor, shape.tensor, tensor_on_node, fabric) + reduce_seconds(
        traffic.context, shape.context, context_on_node, fabric
    )
