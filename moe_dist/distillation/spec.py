"""Options of `moe-dist store-logits`; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass

from moe_dist.launch.options import option


@dataclass(frozen=True)
class StoreSpec:
    """Storing of a teacher's predictions.

    Attributes:
        target: folder to write.
    """

    target: str
    top_k: int = option(64, "Likeliest next tokens to store of each token.", minimum=1)
