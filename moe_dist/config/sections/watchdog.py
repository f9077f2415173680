"""What happens when a rank hangs."""

from pydantic import Field

from moe_dist.config.sections.base import NonNegative, Section


class WatchdogConfig(Section):
    """What happens when a rank hangs."""

    seconds: NonNegative | None = Field(
        None,
        description="without progress for so long, all ranks write their stacks and stop; 0: never; null: half of "
        "world.timeout_seconds",
    )
