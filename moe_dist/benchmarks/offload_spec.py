"""Specification of the offload benchmark; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass
from pathlib import Path

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError
from moe_dist.launch.options import option


@dataclass(frozen=True)
class OffloadBenchSpec:
    """Sizes of the model, its budget, and the numbers of active clusters."""

    active: tuple[int, ...] = option((1, 2, 4, 8, 16), "Active clusters of each layer; may be given again.")
    clusters: int = option(16, "Clusters of each layer.")
    layers: int = option(2, "Layers.")
    hidden: int = option(256, "Width of the model.")
    expert_hidden: int = option(512, "Width of an expert.")
    budget: float = option(0.2, "Device budget as a share of all clusters' training state.")
    steps: int = option(6, "Measured steps of each case.")

    def config(self, lazy: bool, folder: Path) -> RunConfig:
        """Return the configuration of a case.

        Raises:
            ConfigError: a number does not fit.
        """
        if self.steps < 1 or not all(1 <= active <= self.clusters for active in self.active):
            raise ConfigError(f"--steps must be 1 or more, and each --active 1 to {self.clusters}")
        whole = 16 * self.layers * self.clusters * 3 * self.hidden * self.expert_hidden
        return load_config(None, [
            f"model.layers={self.layers}", f"model.hidden_size={self.hidden}", "model.heads=4",
            "model.sequence_length=64", f"moe.experts={4 * self.clusters}", f"moe.clusters={self.clusters}",
            f"moe.expert_hidden={self.expert_hidden}", "moe.balance=none", "train.precision=float32",
            "train.global_batch_size=8", f"train.steps={1000}", "memory.offload=true",
            f"memory.directory={folder}/blocks", f"memory.device_budget_bytes={int(self.budget * whole)}",
            f"memory.lazy_updates={str(lazy).lower()}",
        ])  # fmt: skip
