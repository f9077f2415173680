"""Detection of hangs."""

from pydantic import Field

from moe_dist.config.sections.base import NonNegative, Section


class WatchdogConfig(Section):
    """Detection of hanging ranks."""

    seconds: NonNegative | None = Field(
        None,
        description="time without progress after which all ranks write their stacks and stop; 0: never; null: half "
        "of world.timeout_seconds",
    )
