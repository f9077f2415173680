"""Typed configuration of a run: all sections.

Keys, defaults and checks of one section are in its file in `sections/`, checks between sections in `consistency.py`,
and checks that need the number of ranks in `world.py`. No torch is imported, so that the launcher answers at once.
"""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from moe_dist.config import consistency
from moe_dist.config.layer_kinds import LAYER_KINDS
from moe_dist.config.sections.base import NonNegative, PathText, Section
from moe_dist.config.sections.checkpoint import CheckpointConfig
from moe_dist.config.sections.data import CorpusConfig, TokenizerConfig
from moe_dist.config.sections.distill import DistillConfig
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
    """Configuration of one run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="name of the run and of its folder in runs_dir"
    )
    runs_dir: PathText = Field("runs", description="folder of all runs")
    seed: NonNegative = Field(
        0, description="seed of initial values, of the order of sequences, and of all else that is drawn"
    )
    tensorboard: bool = Field(True, description="also write the metrics for TensorBoard")
    wandb: str | None = Field(
        None, description="project of Weights & Biases that also receives the figures; WANDB_MODE=offline works"
    )
    mlflow: str | None = Field(
        None, description="experiment of MLflow that also receives the figures, by default in the run's folder"
    )
    picture: bool = Field(False, description="draw the run's figures in run.png, in its folder")
    summary_copy: PathText | None = Field(
        None, description="a file that also receives summary.json; --json FILE sets it"
    )
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    recluster: ReclusterConfig = ReclusterConfig()
    world: WorldConfig = WorldConfig()
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def moe_layers(self) -> int:
        """Layers that are of `moe.kind`, after the leading dense ones."""
        return self.model.layers - self.moe.dense_layers

    @property
    def standard_steps(self) -> int:
        """Steps of the standard warm-up before the experts are clustered; 0: no warm-up."""
        return consistency.standard_steps(self.moe, self.train)

    def phase_after(self, step: int) -> "RunConfig":
        """Return the configuration after `step` steps: with standard experts during a warm-up, else this one."""
        if step >= self.standard_steps:
            return self
        moe = self.moe.model_copy(update={"kind": "standard", "warmup_standard": 0.0})
        return self.model_copy(update={"moe": moe, "recluster": ReclusterConfig(), "precision": PrecisionConfig()})

    def of_kind(self, kind: str, **train: Any) -> "RunConfig":
        """Return the configuration with another kind of layer, without what only clusters have.

        Args:
            train: other values of the section `train`; with other `steps` nothing is re-clustered.

        Raises:
            ConfigError: the kind does not fit the other settings.
        """
        tree = self.model_dump()
        tree["moe"]["kind"] = kind
        tree["train"].update(train)
        if not LAYER_KINDS[kind].clustered:
            tree["moe"]["warmup_standard"] = 0.0
            tree |= {"precision": {}, "memory": {}}
        if not LAYER_KINDS[kind].clustered or "steps" in train:
            tree["recluster"] = {}
        try:
            return RunConfig.model_validate(tree)
        except ValueError as error:
            raise ConfigError(f"as {kind} experts: {' '.join(str(error).split())}") from error

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        consistency.check_attention_layout(self.world, self.model)
        consistency.check_dense_layers(self.model, self.moe, self.memory)
        consistency.check_pipeline(self.world, self.model, self.memory, self.moe)
        consistency.check_warmup(self.moe, self.train)
        consistency.check_tokenizer(self.corpus, self.tokenizer)
        consistency.check_precision(self.precision, self.moe)
        consistency.check_packed(self.precision, self.memory, self.train)
        consistency.check_rank(self.model, self.moe, self.recluster)
        consistency.check_offload(self.memory, self.moe)
        consistency.check_trainable(self.optimizer, self.moe, self.recluster, self.memory, self.precision)
        consistency.check_muon(self.optimizer, self.world, self.moe, self.memory, self.precision)
        self.moe.layer_kind.check_layout(self.world, self.moe)
        consistency.check_slices(self.world, self.moe, self.precision, self.memory, self.recluster)
        consistency.check_distill(self.distill, self.world, self.moe, self.train, self.optimizer)
        consistency.check_recluster(self.recluster, self.moe, self.train)
        return self
