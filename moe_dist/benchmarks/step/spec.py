"""Specification of the step benchmark; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError
from moe_dist.launch.options import option

KINDS = {
    "clustered": "clustered",
    "standard": "standard",
    "dense": "dense",
    "megatron-moe": "standard",
    "megatron-dense": "dense",
}
"""Kinds of layer, and the `moe.kind` of each; Megatron-core's own GPT has its `MoELayer` or its MLP."""


@dataclass(frozen=True)
class StepBenchSpec:
    """Step benchmark of some kinds of layer on the same backbone.

    Attributes:
        json_file: file that also receives the figures.
    """

    kinds: tuple[str, ...] = option(
        ("clustered", "standard"),
        f"A kind of layer ({', '.join(KINDS)}); may be given again; speeds are relative to the last. "
        "Default: clustered, standard.",
        flag="--kind",
    )
    rounds: int = option(5, "Rounds of some steps of each kind.")
    steps: int = option(2, "Steps of each kind in a round.")
    warmup: int = option(2, "Steps before the first round.")
    divided: int = option(4, "Steps whose time is divided into parts after the rounds; 0: none.")
    json_file: str | None = None

    def configs(self, config: RunConfig) -> dict[str, RunConfig]:
        """Return the configuration with each kind of layer, and with the steps that the measurement takes.

        Raises:
            ConfigError: a number is too small, or a kind is unknown or does not fit the other settings.
        """
        for name, least in (("rounds", 1), ("steps", 1), ("warmup", 1), ("divided", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)} must be {least} or more")
        if not self.kinds or (unknown := sorted(set(self.kinds) - set(KINDS))):
            raise ConfigError(f"--kind {unknown[0] if self.kinds else ''}: use {', '.join(KINDS)}")
        steps = self.warmup + self.rounds * self.steps + self.divided + 1
        train = {"steps": steps, "warmup_steps": 0, "eval_every": 0}
        configs = {kind: config.of_kind(KINDS[kind], **train) for kind in self.kinds}
        for kind in filter(is_megatron, self.kinds):
            _check_megatron(kind, configs[kind])
        return configs


def is_megatron(kind: str) -> bool:
    """Return True for Megatron-core's own GPT."""
    return kind.startswith("megatron-")


def _check_megatron(kind: str, config: RunConfig) -> None:
    """Reject what Megatron-core's GPT is not measured with.

    Raises:
        ConfigError: the configuration has such a value.
    """
    moe, chunks, precision = config.moe, config.world.virtual_pipeline, config.train.precision
    wrong = {
        f"train.precision={precision}: it is measured in float32": precision != "float32",
        f"world.virtual_pipeline={chunks}: it is measured with one chunk a stage": chunks > 1,
        "model.latent: it is measured with plain attention": config.model.latent is not None,
        f"moe.dense_layers={moe.dense_layers}: all its layers are alike": moe.dense_layers > 0,
        "moe.shared_expert_hidden: it is measured without shared experts": moe.shared_expert_hidden > 0,
        "moe.capacity_factor: it is measured without dropping": moe.capacity_factor is not None,
    }
    for text, is_so in wrong.items():
        if is_so:
            raise ConfigError(f"--kind {kind}: {text}")
