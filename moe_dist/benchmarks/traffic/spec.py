"""Specification of a traffic measurement; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError
from moe_dist.launch.options import option

KINDS = ("clustered", "standard", "dense", "deepspeed", "megatron")


@dataclass(frozen=True)
class TrafficSpec:
    """Traffic measurement of some kinds of layer; `deepspeed` and `megatron` are their own MoE layers on random tokens.

    Attributes:
        json_file: file that also receives the figures.
    """

    kinds: tuple[str, ...] = option(
        (), "A kind of layer; may be given again. Default: the configured one and standard.", flag="--kind"
    )
    steps: int = option(3, "Counted steps, and as many timed ones.", minimum=1)
    warmup: int = option(2, "Steps before the measurement.", minimum=0)
    profile: bool = option(False, "Also divide the time of a step and save a trace.", flag="--profile")
    json_file: str | None = None

    def __post_init__(self) -> None:
        """Check the kinds of layer."""
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ConfigError(f"--kind {unknown[0]}: use {', '.join(KINDS)}")

    def kinds_for(self, config: RunConfig) -> tuple[str, ...]:
        """Return the requested kinds, or else the configured one and `standard`."""
        return self.kinds or tuple(dict.fromkeys((config.moe.kind, "standard")))

    def config_for(self, config: RunConfig, kind: str) -> RunConfig:
        """Return the configuration with another kind of layer, and with the steps that the measurement takes.

        Raises:
            ConfigError: the kind does not fit the other settings.
        """
        steps = self.warmup + (4 if self.profile else 2) * self.steps + 1
        train = {"steps": steps, "warmup_steps": 0, "eval_every": 0, "log_every": steps + 1}
        return config.of_kind(kind, **train)
