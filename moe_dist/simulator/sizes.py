"""Parameters of a rank and FLOPs of a token: formulas over the configuration."""

from dataclasses import dataclass

from moe_dist.config import BatchShape, ModelConfig, RunConfig, WorldShape
from moe_dist.errors import ConfigError
from moe_dist.moe.parameter_class import ParameterClass


def parameters_on_rank(
    config: RunConfig, shape: WorldShape, vocabulary: int, stage: int = 0
) -> dict[ParameterClass, int]:
    """Return the number of parameters of each class on one rank of a pipeline stage."""
    _require_known(config)
    model, moe = config.model, config.moe
    d, last = model.hidden_size, stage == shape.pipeline - 1
    layers = model.layers // shape.pipeline
    embedding = vocabulary * d * ((stage == 0) + (last and not model.tie_embeddings))
    layer = moe.layer_kind.parameters(d, moe, shape.cluster, shape.shard, shape.sliced)
    norms = _head_norms(model)
    divided = embedding + layers * (_attention_parameters(model) - norms)
    dense = d * last + layers * (norms + 2 * d + layer.dense)
    if shape.tensor == 1:
        dense, divided = dense + divided, 0
    return {
        ParameterClass.DENSE: dense,
        ParameterClass.TENSOR: divided // shape.tensor,
        ParameterClass.BASE: layers * layer.base,
        ParameterClass.EXPERT: layers * layer.expert,
    }


def _require_known(config: RunConfig) -> None:
    """Reject models whose layers differ from each other, or whose attention is not a plain one."""
    for key, found in (("model.latent", config.model.latent), ("moe.dense_layers", config.moe.dense_layers)):
        if found:
            raise ConfigError(f"{key} is not known to predictions of memory and time: leave it out")


def _attention_parameters(model: ModelConfig) -> int:
    d, width = model.hidden_size, model.head_width
    queries, keys = model.heads * width, (model.kv_heads or model.heads) * width
    return 2 * d * (queries + keys) + _head_norms(model) + (queries + 2 * keys) * model.qkv_bias


def _head_norms(model: ModelConfig) -> int:
    """Return the weights of the norms of queries and keys."""
    width = model.head_width
    return {"none": 0, "head": 2 * width, "width": (model.heads + (model.kv_heads or model.heads)) * width}[
        model.qk_norm
    ]


def tokens_on_rank(config: RunConfig, shape: WorldShape, batch: BatchShape) -> int:
    """Return the tokens of one micro-batch whose feed-forward layers a rank routes."""
    return batch.micro * config.model.sequence_length // shape.sequence_parts


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
    _require_known(config)
    model, moe = config.model, config.moe
    d = model.hidden_size
    layer = 2.0 * _attention_parameters(model) + 2 * model.sequence_length * model.heads * model.head_width
    feed_forward = moe.layer_kind.work(d, moe)
    head = 2.0 * d * vocabulary
    return TokenWork(layer + feed_forward.token, head, feed_forward.row, feed_forward.rows)
