"""Training passes of a pipeline stage: Megatron-core's schedule, with DeepSpeed's backward passes.

DeepSpeed runs the backward pass of a scalar. For hidden states h with the gradient g of the next stage that scalar is
sum(h * g), whose gradients are the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.megatron_schedule import run_schedule


class StageGroups:
    """Process groups of a pipeline stage in the form of Megatron-core's `mpu`, by which DeepSpeed asks for them."""

    def __init__(self, mesh: Mesh) -> None:
        self._stage, self._pipeline = mesh.group(GroupKind.STAGE), mesh.group(GroupKind.PIPELINE)
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that hold the same layers, over which dense gradients are reduced."""
        return self._stage.handle

    def get_data_parallel_world_size(self) -> int:
        """Return the number of these ranks."""
        return self._stage.size

    def get_data_parallel_rank(self) -> int:
        """Return this rank's index among them."""
        return self._mesh.rank % self._stage.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that together hold all layers, which agree on overflows."""
        return self._pipeline.handle

    def get_model_parallel_world_size(self) -> int:
        """Return the number of these ranks."""
        return self._pipeline.size

    def get_model_parallel_rank(self) -> int:
        """Return this rank's index among them."""
        return self._mesh.stage

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the group of `get_model_parallel_group`: to DeepSpeed, stages are parts of each layer."""
        return self._pipeline.handle

    def get_tensor_model_parallel_world_size(self) -> int:
        """Return 1: DeepSpeed must not look for replicated parameters in other stages."""
        return 1

    def get_tensor_model_parallel_rank(self) -> int:
        """Return 0, see `get_tensor_model_parallel_world_size`."""
        return 0


class StageModel(nn.Module):
    """Pipeline stage as a module for DeepSpeed, whose forward pass is that of one chunk."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequence_BS: Tensor, chunk: int, received_SBD: Tensor | None) -> Tensor:
        """Return the hidden states after a chunk, or the mean loss after the last."""
        output = self.model.run_chunk(sequence_BS, chunk, received_SBD)
        return self.model.mean_of(output) if self.model.stage.ends(chunk) else output


class StagePasses:
    """Forward and backward passes of a step on one pipeline stage.

    Attributes:
        idle: share of the last step's passes in which this rank computed nothing (pipeline bubble and messages).
    """

    def __init__(self, engine: Any, model: LanguageModel) -> None:
        self._engine, self._model = engine, model
        self._left, self._busy, self.idle = 0, 0.0, 0.0

    def run(self, micro_batches: Sequence[Tensor], scale: float, applied: float) -> Tensor:
        """Run the passes of a step; return the mean loss on the last stage, 0 on the others. Collective.

        Args:
            scale: factor of the loss.
            applied: factor by which DeepSpeed multiplies the scalar of each backward pass.
        """
        model, losses, started = self._model, [micro_batches[0].new_zeros((), dtype=torch.float32)], perf_counter()
        weight = None if model.tied is None else model.tied.weight
        self._left, self._busy = len(micro_batches) * len(model.stage.chunks) + (weight is not None), 0.0

        def forward(sequence_BS: Tensor, chunk: int, received_SBD: Tensor | None) -> Tensor:
            with self._timed():
                output: Tensor = self._engine(sequence_BS, chunk, received_SBD)
            if model.stage.ends(chunk):
                losses.append(output.detach().float())
            return output

        def backward(output: Tensor, gradient: Tensor) -> None:
            with self._timed():
                self._backward(output, gradient, scale if output.ndim == 0 else 1 / applied)

        model.fetch_embedding()
        run_schedule(model.gpt, model.context.mesh, micro_batches, forward, backward)
        if model.tied is not None:
            gradient = model.tied.gradient()
            if weight is not None:
                assert gradient is not None
                backward(weight, gradient)
        self.idle = 1 - self._busy / (perf_counter() - started)
        return torch.stack(losses).sum() / len(micro_batches)

    def _backward(self, output: Tensor, gradient: Tensor, factor: float) -> None:
        self._left -= 1
        self._engine.set_gradient_accumulation_boundary(self._left == 0)
        self._engine.backward(factor * (output.float() * gradient.float()).sum(), scale_wrt_gas=False)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = perf_counter()
        yield
        self._busy += perf_counter() - started
