"""A cluster whose parameters are wherever its residency has them, and the computation that brings them in.

While a cluster is not in use each of its parameters is a *placeholder*: one NaN in the parameter's shape, so that what
computes with an absent weight by mistake is noticed at once. In use, parameters are views of a block.

The forward pass brings the weights in and lets them go again. What autograd saves of them is a reference, so that
nothing holds on to the buffer; the backward pass brings them in once more, beside a gradient to be added to. Two
identities in the graph mark where a cluster's backward pass begins and ends.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from moe_dist.memory.block import Block, BlockLayout, BlockSize, TensorKind
from moe_dist.memory.block_cache import BlockCache


class Schedule(Protocol):
    """What a cluster tells of its use, and what is decided for it."""

    recomputing: bool
    """A forward pass is repeated for the backward pass of its layer, which follows at once."""
    recomputes: bool
    """Forward passes will be repeated: what autograd saves in the first is thrown away."""

    def forward_begins(self, cluster: "OffloadedCluster", rows: int) -> None:
        """Its weights will be used next, for so many rows."""

    def backward_begins(self, cluster: "OffloadedCluster") -> None:
        """Its weights and gradient will be used next."""

    def gradient_is_complete(self, cluster: "OffloadedCluster", gradient: Tensor) -> None:
        """The backward pass of a micro-batch has added all that it has; the gradient is still here."""


@dataclass(frozen=True)
class _Reference:
    """A tensor that autograd would have saved, as its place in the cluster's weights."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class OffloadedCluster:
    """The parameters of one cluster of one layer, kept as blocks."""

    def __init__(
        self,
        layer: int,
        local: int,
        parameters: Mapping[str, nn.Parameter],
        residency: BlockCache,
        schedule: Schedule,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args: dtype: of weights; what the optimizer and gradients have is float32."""
        self.layer, self.local, self.dtype, self.device = layer, local, dtype, device
        self.layout = BlockLayout.of({name: parameter.shape for name, parameter in parameters.items()})
        self.parameters = dict(parameters)
        self._residency, self._schedule = residency, schedule
        self._weights: Tensor | None = None
        self._uses = 0
        self._gradient: dict[nn.Parameter, Tensor] = {}
        self._flat_gradient: Tensor | None = None
        self._kept_for_backward = False
        self.has_gradient = False
        """The block of gradients holds those of micro-batches of this step."""
        self.expects_backward = 0
        """Forward passes whose backward passes are still to come."""
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def sizes(self) -> dict[TensorKind, BlockSize]:
        """Of each block; in float32 the weights are their own masters."""
        masters = [] if self.dtype is torch.float32 else [TensorKind.MASTER]
        wide = dict.fromkeys(
            [TensorKind.GRADIENT, *masters, TensorKind.EXP_AVG, TensorKind.EXP_AVG_SQ],
            BlockSize(self.layout.elements, torch.float32),
        )
        return {TensorKind.WEIGHT: BlockSize(self.layout.elements, self.dtype), **wide}

    def block(self, kind: TensorKind) -> Block:
        """The block of this cluster that holds what `kind` says."""
        return Block(self.layer, self.local, kind)

    @torch.no_grad()
    def adopt(self, state: BlockCache) -> None:
        """Takes the parameters' values into blocks, and leaves placeholders. `state`: where training state is kept."""
        sizes = self.sizes()
        for kind, size in sizes.items():
            on_device = kind in (TensorKind.WEIGHT, TensorKind.GRADIENT)
            (self._residency if on_device else state).register(self.block(kind), size)
        for kind in (TensorKind.WEIGHT, TensorKind.MASTER):
            if kind in sizes:
                flat = state.acquire(self.block(kind), blank=True)
                for name, view in self.layout.views(flat).items():
                    view.copy_(self.parameters[name].to(self.dtype))  # masters start rounded, as DeepSpeed's do
                state.release(self.block(kind), changed=True)
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._take_gradient)
        self._show_placeholders()

    def run(self, compute: Callable[..., Tensor], rows: int, *inputs: Tensor) -> Tensor:
        """`compute(*inputs)`, which uses the parameters; differentiable in inputs and parameters."""
        self._schedule.forward_begins(self, rows)
        if not torch.is_grad_enabled():
            with self.weights():
                return compute(*inputs)
        if not self._schedule.recomputing:
            self.expects_backward += 1
        entered = _Enter.apply(self, self._anchor, *inputs)  # type: ignore[no-untyped-call]
        if self._schedule.recomputing:
            if not self._kept_for_backward:
                self._kept_for_backward = True
                self._bring_weights_in()
            result = compute(*entered)
        elif self._schedule.recomputes:
            with self.weights():
                result = compute(*entered)
        else:
            with self.weights(), saved_tensors_hooks(self._pack, self._unpack):
                result = compute(*entered)
        left: Tensor = _Leave.apply(self, result)  # type: ignore[no-untyped-call]
        return left

    def skip(self) -> None:
        """Says that a forward pass had no rows for it: its weights stay where they are."""
        self._schedule.forward_begins(self, 0)
        self._residency.unwant(self.block(TensorKind.WEIGHT))

    @contextmanager
    def weights(self, *, changed: bool = False) -> Iterator[None]:
        """The parameters have their values for the length of a `with`. `changed`: they are written to."""
        self._bring_weights_in()
        try:
            yield
        finally:
            self._let_weights_go(changed)

    def begin_backward(self) -> None:
        """Brings the weights in, and room for their gradient."""
        self._schedule.backward_begins(self)
        self._bring_weights_in()
        flat = self._residency.acquire(self.block(TensorKind.GRADIENT), blank=not self.has_gradient)
        self.has_gradient, self._flat_gradient = True, flat
        views = self.layout.views(flat)
        self._gradient = {self.parameters[name]: view for name, view in views.items()}

    def finish_backward(self) -> None:
        """Hands the gradient on; the last of the passes that were expected may follow."""
        assert self._flat_gradient is not None
        self._schedule.gradient_is_complete(self, self._flat_gradient)
        self._gradient, self._flat_gradient = {}, None
        self.expects_backward -= 1
        self._residency.release(self.block(TensorKind.GRADIENT), changed=True)
        self._let_weights_go()
        if self._kept_for_backward:
            self._kept_for_backward = False
            self._let_weights_go()

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        """Adds what autograd has accumulated to the block, and keeps nothing beside it."""
        if parameter not in self._gradient:
            raise RuntimeError(f"layer {self.layer}, cluster place {self.local}: a gradient outside its backward pass")
        assert parameter.grad is not None
        self._gradient[parameter].add_(parameter.grad)
        parameter.grad = None

    def _bring_weights_in(self) -> None:
        flat = self._residency.acquire(self.block(TensorKind.WEIGHT))
        self._uses += 1
        if self._uses == 1:
            self._weights = flat
            for name, view in self.layout.views(flat).items():
                self.parameters[name].data = view

    def _let_weights_go(self, changed: bool = False) -> None:
        self._uses -= 1
        if not self._uses:
            self._weights = None
            self._show_placeholders()
        self._residency.release(self.block(TensorKind.WEIGHT), changed=changed)

    def _show_placeholders(self) -> None:
        nothing = torch.full((1,), float("nan"), dtype=self.dtype, device=self.device)
        for name, parameter in self.parameters.items():
            parameter.data = nothing.expand(self.layout.spans[name].shape)

    def _pack(self, tensor: Tensor) -> Any:
        assert self._weights is not None
        if tensor.untyped_storage().data_ptr() != self._weights.untyped_storage().data_ptr():
            return tensor
        return _Reference(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Reference):
            return packed  # type: ignore[no-any-return]
        if self._weights is None:
            raise RuntimeError(f"layer {self.layer}, cluster place {self.local}: weights are used while they are away")
        return torch.as_strided(self._weights, packed.size, packed.stride, packed.offset)


class _Enter(torch.autograd.Function):
    """An identity on what goes into a cluster: the last of its nodes in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cluster: OffloadedCluster, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.cluster = cluster
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.cluster.finish_backward()
        return None, None, *gradients


class _Leave(torch.autograd.Function):
    """An identity on what comes out of it: the first of its nodes in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cluster: OffloadedCluster, result: Tensor) -> Tensor:
        ctx.cluster = cluster
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.cluster.begin_backward()
        return None, gradient
