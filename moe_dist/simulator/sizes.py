"""Parameters of a rank and FLOPs of a token: formulas over the configuration.

Symbols: d model.hidden_size, f moe.expert_hidden, r moe.rank, E experts, G clusters, N = E/G, m top_clusters, k top_k.
"""

from dataclasses import dataclass

from moe_dist.config import ModelConfig, MoEConfig, RunConfig, WorldShape
from moe_dist.moe.parameter_class import ParameterClass

PROJECTIONS = 3  # gate, up and down projections of a SwiGLU


def parameters_on_rank(config: RunConfig, shape: WorldShape, vocabulary: int) -> dict[ParameterClass, int]:
    """Number of parameters of each class on one rank."""
    model, moe = config.model, config.moe
    d, f = model.hidden_size, moe.expert_hidden
    embedding = vocabulary * d * (1 if model.tie_embeddings else 2)
    dense = embedding + d + model.layers * (_attention_parameters(model) + 2 * d)
    base = expert = 0
    if moe.kind == "dense":
        dense += model.layers * PROJECTIONS * d * moe.dense_width
    if moe.kind == "standard":
        dense += model.layers * d * (moe.experts + PROJECTIONS * moe.shared_expert_hidden)
        expert = model.layers * moe.experts // (shape.cluster * shape.shard) * PROJECTIONS * d * f
    if moe.kind == "clustered":
        clusters = moe.clusters // shape.cluster
        dense += model.layers * d * moe.experts
        base = model.layers * clusters * PROJECTIONS * d * f
        expert = model.layers * clusters * (moe.experts_per_cluster // shape.shard) * residual_parameters(model, moe)
    return {ParameterClass.DENSE: dense, ParameterClass.BASE: base, ParameterClass.EXPERT: expert}


def residual_parameters(model: ModelConfig, moe: MoEConfig) -> int:
    """Return the parameters of one expert: factors of both matrices; vectors: gate, two hidden biases, output bias."""
    d, f, r = model.hidden_size, moe.expert_hidden, moe.rank
    return 3 * r * (d + f) + (3 * f + d if moe.expert_vectors else 0)


def _attention_parameters(model: ModelConfig) -> int:
    d, heads = model.hidden_size, model.heads
    return 2 * d * d + 2 * d * (d // heads) * (model.kv_heads or heads)


@dataclass(frozen=True)
class TokenWork:
    """Forward FLOPs of a token in one layer outside its experts, in the output layer, and of one expert row.

    Attributes:
        row: FLOPs of one dispatched row: standard, one copy at one expert; clustered, one token at one cluster with
            its k experts; dense, zero.
        rows: rows per token.
    """

    layer: float
    head: float
    row: float
    rows: int

    def token(self, layers: int) -> float:
        """FLOPs of one token's whole forward pass."""
        return layers * (self.layer + self.rows * self.row) + self.head


def work_of(config: RunConfig, vocabulary: int) -> TokenWork:
    """Return the FLOPs of a token; multiply and add count as two, a causal row attends to half the sequence."""
    model, moe = config.model, config.moe
    d, f, r = model.hidden_size, moe.expert_hidden, moe.rank
    layer = 2.0 * _attention_parameters(model) + 2 * model.sequence_length * d
    head = 2.0 * d * vocabulary
    if moe.kind == "dense":
        return TokenWork(layer + 2 * PROJECTIONS * d * moe.dense_width, head, 0.0, 0)
    if moe.kind == "standard":
        layer += 2.0 * d * (moe.experts + PROJECTIONS * moe.shared_expert_hidden)
        return TokenWork(layer, head, 2.0 * PROJECTIONS * d * f, moe.top_k)
    n = moe.experts_per_cluster  # d-wide products for all experts of the cluster, f-wide ones for the k chosen
    thin = 2.0 * 3 * r * (n * d + moe.top_k * f)
    row = 2.0 * PROJECTIONS * d * f + thin + 2.0 * d * n
    return TokenWork(layer + 2.0 * d * moe.clusters, head, row, moe.top_clusters)
