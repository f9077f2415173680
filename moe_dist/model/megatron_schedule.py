"""Training passes of pipeline stages by Megatron-core's schedules (1F1B, interleaved).

Megatron-core runs the passes in order and sends hidden states and gradients between stages. To its graph the forward
pass of a chunk is a single node, whose backward pass is given by the caller: DeepSpeed must run it, since it reduces
gradients during and after it.

Shapes: B sequences, S tokens of this rank, D model width.
"""

from collections.abc import Callable, Sequence
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from torch import Tensor, nn

from moe_dist.distributed.mesh import Mesh

ForwardPass = Callable[[Tensor, int, Tensor | None], Tensor]
"""Function from sequences [B, S+1], a chunk and the hidden states [S, B, D] that it receives to its output."""
BackwardPass = Callable[[Tensor, Tensor], None]
"""Function that runs the backward pass of an output, given the gradient of it."""


def run_schedule(
    gpt: nn.Module,
    mesh: Mesh,
    micro_batches: Sequence[Tensor],
    forward: ForwardPass,
    backward: BackwardPass,
) -> None:
    """Run the forward and backward passes of all micro-batches through this rank's chunks; collective.

    Args:
        gpt: model of this stage (`build_gpt`).
        micro_batches: token ids [B, S+1] of each micro-batch, all of the same shape.
        forward: forward pass of a chunk; its last output is a scalar loss.
        backward: backward pass; the gradient of the loss is 1 / number of micro-batches.
    """
    shape, numbers = mesh.shape, range(mesh.shape.chunks)
    sequences, length = len(micro_batches[0]), (micro_batches[0].shape[1] - 1) // shape.context
    config: Any = copy(gpt.config)
    config.pipeline_model_parallel_size = config.microbatch_group_size_per_vp_stage = shape.pipeline
    config.virtual_pipeline_model_parallel_size = shape.chunks if shape.chunks > 1 else None
    config.pipeline_dtype = next(gpt.parameters()).dtype
    config.batch_p2p_comm = False  # a batch has one order of messages, and two stages are neighbors on both sides
    replace_devices()
    chunks = [_Chunk(config, chunk, forward, backward) for chunk in numbers]

    def step(batches: Any, chunk: "_Chunk") -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        return chunk.run(next(batches)), lambda loss: (loss, loss.detach())

    passes = (
        schedules.forward_backward_pipelining_with_interleaving
        if len(chunks) > 1
        else schedules.forward_backward_pipelining_without_interleaving
    )
    passes(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=sequences,
    )


class _Chunk(nn.Module):
    """Chunk of layers in the form that Megatron-core's schedules take."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Any, number: int, forward: ForwardPass, backward: BackwardPass) -> None:
        super().__init__()
        self.config, self.vp_stage = config, number
        self._number, self._forward, self._backward = number, forward, backward
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: Any) -> None:
        """Set the hidden states of the chunk before, in a list; None for the first chunk."""
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def run(self, sequence_BS: Tensor) -> Tensor:
        """Return the output for a micro-batch, a leaf's function in Megatron-core's graph."""
        received, self._received = self._received, None
        anchor = torch.zeros((), requires_grad=True)  # the first chunk has no other input that needs a gradient
        run = lambda hidden: self._forward(sequence_BS, self._number, hidden)  # noqa: E731
        output: Tensor = _ChunkPass.apply(anchor, received, run, self._backward)  # type: ignore[no-untyped-call]
        return output


class _ChunkPass(torch.autograd.Function):
    """Forward pass of a chunk as one node, with a graph of its own inside."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, received: Tensor | None, run: Any, backward: BackwardPass) -> Tensor:
        ctx.received = None if received is None else received.detach().requires_grad_()
        with torch.enable_grad():
            ctx.output = run(ctx.received)
        ctx.run_backward = backward
        output: Tensor = ctx.output.detach()
        return output if output.ndim else output.clone()  # Megatron-core divides the loss in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        with torch.enable_grad():
            ctx.run_backward(ctx.output, grad)
        gradient = None if ctx.received is None else ctx.received.grad.contiguous()
        del ctx.output, ctx.received
        return None, gradient, None, None


def replace_devices() -> None:
    """Make the schedules allocate their token count on the CPU instead of CUDA's device, on machines without CUDA."""
    if schedules.torch is torch and not torch.cuda.is_available():
        zeros = lambda *sizes, device=None, **options: torch.zeros(*sizes, **options)  # noqa: E731
        schedules.torch = SimpleNamespace(**{**vars(torch), "zeros": zeros})
