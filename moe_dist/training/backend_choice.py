"""Choice of the backend of clustered experts (`moe.backend=auto`) by measurement, once per run.

Backends differ in the last bits, so the choice is rank 0's for all ranks, and saved in checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.config import RunConfig, WorldShape
from moe_dist.distributed.init import RankInfo
from moe_dist.engine.callback import Callback
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.kernels.backend_choice import BackendShape, measure_backends
from moe_dist.kernels.shared_base_experts import KERNELS, available_backends
from moe_dist.metrics.recorder import Recorder
from moe_dist.moe.clustered_moe import ClusteredMoE


class BackendChoice(Callback):
    """Callback that chooses the backend and saves it in checkpoints."""

    def __init__(
        self, config: RunConfig, shape: WorldShape, process: RankInfo, tokens: int, recorder: Recorder
    ) -> None:
        """Start without a choice.

        Args:
            tokens: number of tokens of a rank's micro-batch.
        """
        self._config, self._world, self._process, self._recorder = config, shape, process, recorder
        self._tokens = tokens
        self._layers: list[ClusteredMoE] = []
        self.backend: str | None = None

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Set the backend of this engine's model at the next start."""
        self._layers = engine.model.clustered_layers()

    def release(self) -> None:
        """Drop the references to the model's layers."""
        self._layers = []

    def start(self, step: int) -> None:
        """Set the layers' backend, measured first if it has not been chosen or does not work here; collective."""
        if not self._layers or self._config.moe.backend != "auto":
            return
        self.backend = self._agreed(step)
        for layer in self._layers:
            layer.set_backend(self.backend)

    def _agreed(self, step: int) -> str:
        """Return the backend of all ranks: the earlier choice if it works on all, else what rank 0 finds now."""
        names, shape, device = list(KERNELS), self._shape(), self._process.device
        usable = available_backends(device, getattr(torch, shape.dtype), shape.rank, shape.expert_hidden)
        mine = torch.tensor([name in usable for name in names], dtype=torch.int64, device=device)
        dist.all_reduce(mine, dist.ReduceOp.MIN)
        common = [name for name, works in zip(names, mine.tolist(), strict=True) if works]
        if self.backend in common:
            return self.backend
        found = torch.zeros(1, dtype=torch.int64, device=device)
        if self._process.rank == 0:
            chosen = self._measure(step, shape)
            found[0] = names.index(chosen if chosen in common else common[0])
        dist.broadcast(found, 0)
        return names[int(found)]

    def _measure(self, step: int, shape: BackendShape) -> str:
        times = measure_backends(shape, self._process.device)
        self._recorder.event("backend", step, backend=times.fastest, seconds=times.seconds)
        if times.seconds:
            self._recorder.note(f"moe.backend=auto chose {times}")
        return times.fastest

    def _shape(self) -> BackendShape:
        config, world = self._config, self._world
        size = (config.model.hidden_size, config.train.precision, self._tokens, world.cluster, world.shard)
        return BackendShape.of(config.moe, *size)

    def state(self) -> dict[str, Any]:
        """Return the choice for checkpoints."""
        return {"backend": self}

    def state_dict(self) -> dict[str, Any]:
        """Return the choice."""
        return {} if self.backend is None else {"backend": self.backend}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore an earlier choice."""
        self.backend = str(state["backend"])
