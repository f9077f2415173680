"""FLOPs of a token and parameters of attention: formulas over the configuration."""

from dataclasses import dataclass

from moe_dist.config.schema import RunConfig
from moe_dist.config.sections.model import ModelConfig
from moe_dist.errors import ConfigError


def require_known(config: RunConfig) -> None:
    """Reject models whose layers differ from each other, or whose attention is not a plain one.

    Raises:
        ConfigError: names the key.
    """
    for key, found in (("model.latent", config.model.latent), ("moe.dense_layers", config.moe.dense_layers)):
        if found:
            raise ConfigError(f"{key} is not known to predictions of memory and time: leave it out")


def attention_parameters(model: ModelConfig) -> int:
    """Return the parameters of one layer's attention, norms of queries and keys included."""
    d, width = model.hidden_size, model.head_width
    queries, keys = model.heads * width, (model.kv_heads or model.heads) * width
    return 2 * d * (queries + keys) + head_norms(model) + (queries + 2 * keys) * model.qkv_bias


def head_norms(model: ModelConfig) -> int:
    """Return the weights of the norms of queries and keys."""
    width = model.head_width
    return {"none": 0, "head": 2 * width, "width": (model.heads + (model.kv_heads or model.heads)) * width}[
        model.qk_norm
    ]


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
    require_known(config)
    model, moe = config.model, config.moe
    d = model.hidden_size
    layer = 2.0 * attention_parameters(model) + 2 * model.sequence_length * model.heads * model.head_width
    feed_forward = moe.layer_kind.work(d, moe)
    head = 2.0 * d * vocabulary
    return TokenWork(layer + feed_forward.token, head, feed_forward.row, feed_forward.rows)
