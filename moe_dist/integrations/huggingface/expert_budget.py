"""Rank of the residuals for a share of a mixture's expert parameters."""

from collections.abc import Sequence

from moe_dist.config import MoEConfig, RunConfig, load_config
from moe_dist.config.layer_kinds import LAYER_KINDS
from moe_dist.errors import ConfigError


def words_within_budget(plain: RunConfig, words: Sequence[str], keep: float) -> list[str]:
    """Return the words of a compressed mixture with the largest rank that keeps a share of the expert parameters.

    Unless words say otherwise all experts form one cluster, in which routing is that of the mixture.

    Args:
        plain: configuration of the mixture.
        words: settings of the run; they may set everything but the rank.
        keep: share of the parameters of all experts that bases and residuals may have together.

    Raises:
        ConfigError: the model is dense, the rank is set, or the bases alone are more than the share.
    """
    if not plain.moe.layer_kind.routed:
        raise ConfigError(f"--keep {keep:g} compresses a mixture, but the model is dense: leave it out")
    if any(word.startswith("moe.rank=") for word in words):
        raise ConfigError(f"--keep {keep:g} chooses moe.rank: leave one of them out")
    wanted = ["moe.kind=clustered", "moe.clusters=1", *words]
    chosen = load_config(None, wanted, plain.model_dump(mode="json"))
    return [*wanted, f"moe.rank={largest_rank(plain.model.hidden_size, chosen.moe, keep)}"]


def largest_rank(hidden_size: int, moe: MoEConfig, keep: float) -> int:
    """Return the largest rank with which bases and residuals have at most a share of the standard experts' parameters.

    Raises:
        ConfigError: rank 1 has more.
    """
    kind = LAYER_KINDS["clustered"]

    def size(rank: int) -> int:
        layer = kind.parameters(hidden_size, moe.model_copy(update={"rank": rank}), 1, 1)
        return layer.base + layer.expert

    budget = keep * LAYER_KINDS["standard"].standard_parameters(hidden_size, moe)
    least, slope = size(1), size(2) - size(1)
    if least > budget:
        raise ConfigError(
            f"--keep {keep:g} is {budget:,.0f} parameters of a layer, but moe.clusters={moe.clusters} bases with "
            f"residuals of rank 1 have {least:,}: keep more, or set fewer clusters"
        )
    return min(1 + int((budget - least) // slope), hidden_size, moe.expert_hidden)
