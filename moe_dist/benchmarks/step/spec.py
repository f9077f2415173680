"""What `moe-dist bench step` is asked for; no torch here, so that a refusal comes at once."""

from dataclasses import dataclass
from typing import Any, Self

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError

KINDS = ("clustered", "standard", "dense")


@dataclass(frozen=True)
class StepBenchSpec:
    """What to measure.

    Attributes:
        kinds: of layer, on the same backbone; speeds are told over the last one's.
        rounds: of `steps` steps of each kind in turn, after `warmup` steps.
        divided: steps whose time is divided over its parts afterwards; 0: none.
    """

    kinds: tuple[str, ...] = ("clustered", "standard")
    rounds: int = 5
    steps: int = 2
    warmup: int = 2
    divided: int = 4
    json_file: str | None = None

    @classmethod
    def from_words(cls, words: dict[str, Any]) -> Self:
        """From `asdict`, after a way through JSON."""
        return cls(**{**words, "kinds": tuple(words["kinds"])})

    def configs(self, config: RunConfig) -> dict[str, RunConfig]:
        """The configuration with each kind of layer, and as many steps as the measurement takes.

        Raises:
            ConfigError: a number is too small, or a kind is unknown or does not fit the other settings.
        """
        for name, least in (("rounds", 1), ("steps", 1), ("warmup", 1), ("divided", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)} must be {least} or more")
        if not self.kinds or (unknown := sorted(set(self.kinds) - set(KINDS))):
            raise ConfigError(f"--kind {unknown[0] if self.kinds else ''}: use {', '.join(KINDS)}")
        return {kind: self._of_kind(config, kind) for kind in self.kinds}

    def _of_kind(self, config: RunConfig, kind: str) -> RunConfig:
        steps, tree = self.warmup + self.rounds * self.steps + self.divided, config.model_dump()
        tree["moe"]["kind"] = kind
        tree["train"].update(steps=steps + 1, warmup_steps=0, eval_every=0)
        try:
            return RunConfig.model_validate(tree)
        except ValueError as error:
            raise ConfigError(
                f"--kind {kind} does not fit this configuration: {' '.join(str(error).split())}"
            ) from error
