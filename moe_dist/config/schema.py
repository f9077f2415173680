"""The typed configuration of a run: every section, and what must fit between them.

A section's keys, their defaults and the checks that concern it alone are in its file in `sections/`; checks that need
the number of ranks are in `config/world.py`. Nothing here imports torch, so that the launcher answers at once.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import NonNegative, Section
from moe_dist.config.sections.checkpoint import CheckpointConfig
from moe_dist.config.sections.data import CorpusConfig, TokenizerConfig
from moe_dist.config.sections.memory import MemoryConfig
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.moe import MoEConfig
from moe_dist.config.sections.precision import PrecisionConfig
from moe_dist.config.sections.recluster import ReclusterConfig
from moe_dist.config.sections.train import OptimizerConfig, TrainConfig
from moe_dist.config.sections.watchdog import WatchdogConfig
from moe_dist.config.sections.world import WorldConfig
from moe_dist.errors import ConfigError


class RunConfig(Section):
    """One run, whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="folder in runs_dir"
    )
    runs_dir: str = "runs"
    seed: NonNegative = 0
    tensorboard: bool = True
    summary_copy: str | None = Field(None, description="a file that also receives summary.json; --json FILE sets it")
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    recluster: ReclusterConfig = ReclusterConfig()
    world: WorldConfig = WorldConfig()
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def standard_steps(self) -> int:
        """Steps of the standard warm-up that comes before the experts are clustered; 0: there is none."""
        return round(self.moe.warmup_standard * self.train.steps)

    def phase_after(self, step: int) -> "RunConfig":
        """What the model is after `step` steps: with standard experts during their warm-up, then as configured."""
        if step >= self.standard_steps:
            return self
        moe = self.moe.model_copy(update={"kind": "standard", "warmup_standard": 0.0})
        return self.model_copy(update={"moe": moe, "recluster": ReclusterConfig(), "precision": PrecisionConfig()})

    @model_validator(mode="after")
    def _warmup_leaves_both_phases(self) -> Self:
        if self.moe.warmup_standard and not 0 < self.standard_steps < self.train.steps:
            raise ConfigError(
                f"moe.warmup_standard={self.moe.warmup_standard} of train.steps={self.train.steps} is "
                f"{self.standard_steps} steps: at least 1 must be trained before and after the experts are clustered"
            )
        return self

    @model_validator(mode="after")
    def _residuals_can_be_stored(self) -> Self:
        if self.precision.residuals != "none" and self.moe.kind != "clustered":
            raise ConfigError(
                f"precision.residuals={self.precision.residuals} works with moe.kind=clustered only, not "
                f"{self.moe.kind}: set it to none"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_factorised(self) -> Self:
        most = min(self.model.hidden_size, self.moe.expert_hidden)
        needed = self.moe.warmup_standard > 0 or self.recluster.transition == "refit"
        if needed and self.moe.kind == "clustered" and self.moe.rank > most:
            raise ConfigError(
                f"moe.rank={self.moe.rank} is more than experts of model.hidden_size={self.model.hidden_size} and "
                f"moe.expert_hidden={self.moe.expert_hidden} can be cut to: at most {most} with moe.warmup_standard or "
                "recluster.transition=refit"
            )
        return self

    @model_validator(mode="after")
    def _offload_possible(self) -> Self:
        if not self.memory.offload:
            return self
        if self.moe.kind != "clustered":
            raise ConfigError(f"memory.offload=true works with moe.kind=clustered only, not {self.moe.kind}")
        if self.moe.warmup_standard or self.recluster.transition == "refit":
            key = "moe.warmup_standard" if self.moe.warmup_standard else "recluster.transition=refit"
            raise ConfigError(
                f"memory.offload=true does not work with {key} yet: experts would have to be whole in memory"
            )
        if self.moe.overlap_chunks not in ("auto", 1):
            raise ConfigError(
                f"moe.overlap_chunks={self.moe.overlap_chunks} does not work with memory.offload=true, which would "
                "bring a cluster in for each chunk: use auto or 1"
            )
        return self

    @model_validator(mode="after")
    def _layout_possible(self) -> Self:
        world, moe = self.world, self.moe
        if moe.kind == "clustered":
            if world.cluster is not None and moe.clusters % world.cluster:
                raise ConfigError(f"moe.clusters={moe.clusters} cannot be divided over world.cluster={world.cluster}")
            if moe.experts_per_cluster % world.shard:
                raise ConfigError(
                    f"a cluster of {moe.experts_per_cluster} experts (moe.experts={moe.experts} / "
                    f"moe.clusters={moe.clusters}) cannot be divided over world.shard={world.shard}"
                )
        self._reclustering_possible()
        if moe.kind == "standard" and moe.experts % ((world.cluster or 1) * world.shard):
            raise ConfigError(
                f"moe.experts={moe.experts} cannot be divided over world.cluster={world.cluster or 1} x "
                f"world.shard={world.shard} ranks"
            )
        return self

    def _reclustering_possible(self) -> None:
        recluster, moe = self.recluster, self.moe
        if recluster.period is None:
            return
        if moe.kind != "clustered":
            raise ConfigError(
                f"recluster.period={recluster.period} works with moe.kind=clustered only, not {moe.kind}: "
                "set it to null"
            )
        if moe.experts_per_cluster == 1 or moe.clusters == 1:
            raise ConfigError(
                f"recluster.period={recluster.period} has nothing to regroup: moe.experts={moe.experts} in "
                f"moe.clusters={moe.clusters}"
            )
        if int(recluster.max_moved * moe.experts) < 2:
            raise ConfigError(
                f"recluster.max_moved={recluster.max_moved:g} of moe.experts={moe.experts} lets no two exchange their "
                f"places: at least {2 / moe.experts:g}"
            )
        for key, value in (("period", recluster.period), ("start", recluster.start)):
            if value >= self.train.steps:
                raise ConfigError(f"recluster.{key}={value} is longer than the run: train.steps={self.train.steps}")
        if recluster.stop is not None and recluster.stop < recluster.start:
            raise ConfigError(f"recluster.stop={recluster.stop} is before recluster.start={recluster.start}")
