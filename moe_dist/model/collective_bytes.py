"""Bytes of a step's collectives beside the dispatch: attention divided over ranks, pipeline stages, reductions.

Megatron-core gathers the tokens of a tensor group before a divided matrix and scatters sums behind one. Forward, a
layer gathers once and scatters once; backward, it gathers twice (its input again, and the output's gradient) and
scatters once. The embedding has two such passes, the output layer three. Ulysses' all-to-alls send queries, keys,
values and outputs once forward, and their gradients once backward. Stages send hidden states to the next one, and
gradients back; a tied embedding goes to the last stage, and its gradient back.

Left out are what no step's length depends on, a few bytes a token or a layer: sums of the cross-entropy, norms,
statistics of routing. Each formula is held against the collectives that are issued (`tests/distributed/`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.config import BatchShape, RunConfig, WorldShape, tokens_on_rank
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.moe.parameter_class import OF_EXPERTS, ParameterClass, replicas_of

FORWARD_PASSES, BACKWARD_PASSES = 2, 3
PASSES_OF_EMBEDDING, PASSES_OF_OUTPUT_LAYER = 2, 3
Sent = dict[int, float]
"""Bytes to each rank."""


@dataclass(frozen=True)
class AttentionTraffic:
    """Bytes of one micro-batch's passes that go around a group, of which each of n ranks sends (n-1)/n.

    Attributes:
        tensor: gathered and scattered in the tensor group, forward and backward.
        context: exchanged in the context group.
    """

    tensor: float
    context: float


def number_size(config: RunConfig) -> int:
    """Return the bytes of a number of hidden states and gradients."""
    return 4 if config.train.precision == "float32" else 2


def attention_traffic(config: RunConfig, shape: WorldShape, batch: BatchShape, stage: int = -1) -> AttentionTraffic:
    """Return the bytes of the forward and backward passes of a micro-batch on a pipeline stage, by default the last."""
    model, size, stage = config.model, number_size(config), stage % shape.pipeline
    tokens = batch.micro * model.sequence_length // shape.context
    forwards = 2 if model.activation_checkpointing else 1
    passes = forwards * FORWARD_PASSES + BACKWARD_PASSES
    ends = (stage == 0) * PASSES_OF_EMBEDDING + (stage == shape.pipeline - 1) * PASSES_OF_OUTPUT_LAYER
    layers = model.layers // shape.pipeline
    keys = model.kv_heads or model.heads
    if keys // shape.tensor % shape.context:
        keys = model.heads  # they are repeated for each head of queries
    widths = 2 * (model.heads + keys) * model.head_width // shape.tensor
    return AttentionTraffic(
        tensor=(layers * passes + ends) * tokens * model.hidden_size * size if shape.tensor > 1 else 0,
        context=layers * (forwards + 1) * tokens * widths * size if shape.context > 1 else 0,
    )


def message_bytes(config: RunConfig, shape: WorldShape, batch: BatchShape) -> int:
    """Return the bytes of the hidden states of a micro-batch that a rank sends to the next stage."""
    return tokens_on_rank(config, shape, batch) * config.model.hidden_size * number_size(config)


def reduction_rounds(config: RunConfig, batch: BatchShape) -> int:
    """Return the number of ring passes of a step's reductions, as DeepSpeed does them.

    Gradients are all-reduced, which is two passes, in stage 2 for every micro-batch; ZeRO gathers weights in one more.
    """
    stage = config.world.zero_stage
    return 2 * (batch.accumulation if stage == 2 else 1) + (stage > 0)


def muon_bytes(config: RunConfig) -> int:
    """Return the bytes that go around a ring for an element of a matrix that Muon updates.

    Its gradient is all-reduced in float32; under ZeRO it is reduced to the owner, who broadcasts the new weight.
    """
    return 4 + number_size(config) if config.world.zero_stage else 2 * 4


def step_bytes(
    config: RunConfig, mesh: Mesh, batch: BatchShape, vocabulary: int, held: Mapping[ParameterClass, int]
) -> dict[str, Sent]:
    """Return the bytes that this rank sends to each other rank in a step, by purpose; rings send to the next rank.

    Args:
        held: parameters on this rank of each class that it has, without those that Muon updates (`MatrixMuon.sent`).
    """
    tensor: Sent = {}
    context: Sent = {}
    if mesh.shape.sequence_parts > 1:
        traffic = attention_traffic(config, mesh.shape, batch, mesh.stage)
        tensor = _ring(mesh.group(GroupKind.TENSOR).ranks, mesh.rank, batch.accumulation * traffic.tensor)
        others = [rank for rank in mesh.group(GroupKind.CONTEXT).ranks if rank != mesh.rank]
        context = {rank: batch.accumulation * traffic.context / (len(others) + 1) for rank in others}
    reduction: Sent = {}
    for kind, numbers in held.items():
        offloaded = config.memory.offload and kind in OF_EXPERTS  # all-reduced once, after all micro-batches
        around = (2 if offloaded else reduction_rounds(config, batch)) * numbers * number_size(config)
        add(reduction, _ring(replicas_of(kind, mesh), mesh.rank, around))
    if mesh.stage == 0 < mesh.shape.pipeline - 1 and config.model.tie_embeddings and config.world.zero_stage == 2:
        kind = ParameterClass.DENSE if mesh.shape.tensor == 1 else ParameterClass.TENSOR  # the last stage's gradient
        again = 2 * _embedding_bytes(config, mesh.shape, vocabulary)
        add(reduction, _ring(replicas_of(kind, mesh), mesh.rank, again))
    stages = _of_stages(config, mesh, batch, vocabulary) if mesh.shape.pipeline > 1 else {}
    return {"tensor": tensor, "context": context, "pipeline": stages, "reduction": reduction}


def _ring(ranks: tuple[int, ...], rank: int, around: float) -> Sent:
    """Return what a rank of a ring passes on if `around` bytes go around it."""
    return {} if len(ranks) == 1 else {_neighbor(ranks, rank, 1): (len(ranks) - 1) / len(ranks) * around}


def _of_stages(config: RunConfig, mesh: Mesh, batch: BatchShape, vocabulary: int) -> Sent:
    """Return what a rank sends to the stages after and before it: hidden states, gradients, a tied embedding."""
    shape, ranks, found = mesh.shape, mesh.group(GroupKind.PIPELINE).ranks, Sent()
    first, last = mesh.stage == 0, mesh.stage == shape.pipeline - 1
    message = batch.accumulation * message_bytes(config, shape, batch)
    add(found, {_neighbor(ranks, mesh.rank, 1): (shape.chunks - last) * message})
    add(found, {_neighbor(ranks, mesh.rank, -1): (shape.chunks - first) * message})
    if config.model.tie_embeddings and (first or last):
        add(found, {ranks[-1] if first else ranks[0]: _embedding_bytes(config, shape, vocabulary)})
    return found


def _embedding_bytes(config: RunConfig, shape: WorldShape, vocabulary: int) -> int:
    return number_size(config) * (vocabulary // shape.tensor) * config.model.hidden_size


def _neighbor(ranks: tuple[int, ...], rank: int, step: int) -> int:
    return ranks[(ranks.index(rank) + step) % len(ranks)]


def add(total: Sent, sent: Sent) -> None:
    """Add bytes to each rank to a total."""
    for peer, size in sent.items():
        if size:
            total[peer] = total.get(peer, 0.0) + size
