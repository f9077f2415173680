"""Cluster whose parameters are offloaded, and the autograd functions that load them.

While a cluster is not in use each of its parameters is a *placeholder*: one NaN expanded to the parameter's shape, so
that computing with an absent weight shows at once. In use, parameters are views of a block.

The forward pass loads the weights and releases them again. Autograd saves references instead of weights, so that
nothing retains the buffer. The backward pass loads them once more, with a buffer for their gradient. Two identity
functions in the graph mark the start and the end of a cluster's backward pass.
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
    """Callbacks of a cluster's use, and the decisions that it asks for."""

    recomputing: bool
    """True while a forward pass is recomputed for the backward pass that follows at once."""
    recomputes: bool
    """True if forward passes will be recomputed, so that the first saves nothing."""

    def forward_begins(self, cluster: "OffloadedCluster", rows: int) -> None:
        """Announce a forward pass with this number of rows."""

    def backward_begins(self, cluster: "OffloadedCluster") -> None:
        """Announce a backward pass."""

    def before_use(self, cluster: "OffloadedCluster") -> None:
        """Bring the cluster's blocks up to date before one is read or written."""

    def gradient_is_complete(self, cluster: "OffloadedCluster", gradient: Tensor) -> None:
        """React to an accumulated micro-batch's gradient, whose block is still pinned."""


@dataclass(frozen=True)
class _Reference:
    """Reference to a weight that autograd would have saved, by its position in the cluster's block."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class OffloadedCluster:
    """Parameters of one cluster of one layer, stored as blocks."""

    def __init__(
        self,
        layer: int,
        local: int,
        parameters: Mapping[str, nn.Parameter],
        cache: BlockCache,
        schedule: Schedule,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Describe a cluster.

        Args:
            dtype: type of the weights; optimizer state and gradients are float32.
        """
        self.layer, self.local, self.dtype, self.device = layer, local, dtype, device
        self.layout = BlockLayout.of({name: parameter.shape for name, parameter in parameters.items()})
        self.parameters = dict(parameters)
        self._cache, self._schedule = cache, schedule
        self._weights: Tensor | None = None
        self._uses = 0
        self._gradient: dict[nn.Parameter, Tensor] = {}
        self._flat_gradient: Tensor | None = None
        self._kept_for_backward = False
        self.has_gradient = False
        """True if the gradient block holds micro-batches of this step."""
        self.behind = 0
        """Number of updates that are deferred (`engine/offloaded_adamw.py`)."""
        self.expects_backward = 0
        """Number of forward passes whose backward passes are pending."""
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def sizes(self) -> dict[TensorKind, BlockSize]:
        """Return the size of each block; float32 weights are their own masters."""
        masters = [] if self.dtype is torch.float32 else [TensorKind.MASTER]
        wide = dict.fromkeys(
            [TensorKind.GRADIENT, *masters, TensorKind.EXP_AVG, TensorKind.EXP_AVG_SQ],
            BlockSize(self.layout.elements, torch.float32),
        )
        return {TensorKind.WEIGHT: BlockSize(self.layout.elements, self.dtype), **wide}

    def block(self, kind: TensorKind) -> Block:
        """Return this cluster's block of a kind."""
        return Block(self.layer, self.local, kind)

    @torch.no_grad()
    def adopt(self, state: BlockCache) -> None:
        """Move the parameters' values into blocks and leave placeholders.

        Args:
            state: cache that holds optimizer state.
        """
        sizes = self.sizes()
        for kind, size in sizes.items():
            on_device = kind in (TensorKind.WEIGHT, TensorKind.GRADIENT)
            (self._cache if on_device else state).register(self.block(kind), size)
        for kind in (TensorKind.WEIGHT, TensorKind.MASTER):
            if kind in sizes:
                flat = state.acquire(self.block(kind), zero_init=True)
                for name, view in self.layout.views(flat).items():
                    view.copy_(self.parameters[name].to(self.dtype))  # master weights start rounded, as DeepSpeed's do
                state.release(self.block(kind), changed=True)
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._take_gradient)
        self._show_placeholders()

    def run(self, compute: Callable[..., Tensor], rows: int, *inputs: Tensor) -> Tensor:
        """Return `compute(*inputs)` with the parameters loaded; differentiable in inputs and parameters."""
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
                self._load_weights()
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
        """Record a forward pass without rows: the weights are not loaded."""
        self._schedule.forward_begins(self, 0)
        self._cache.cancel_prefetch(self.block(TensorKind.WEIGHT))

    @contextmanager
    def weights(self, *, changed: bool = False) -> Iterator[None]:
        """Load the parameters' values for the length of a `with`.

        Args:
            changed: they are written to.
        """
        self._load_weights()
        try:
            yield
        finally:
            self._release_weights(changed)

    def begin_backward(self) -> None:
        """Load the weights, and a buffer for their gradient."""
        self._schedule.backward_begins(self)
        self._load_weights()
        flat = self._cache.acquire(self.block(TensorKind.GRADIENT), zero_init=not self.has_gradient)
        self.has_gradient, self._flat_gradient = True, flat
        views = self.layout.views(flat)
        self._gradient = {self.parameters[name]: view for name, view in views.items()}

    def finish_backward(self) -> None:
        """Store the gradient and release the weights."""
        assert self._flat_gradient is not None
        self._schedule.gradient_is_complete(self, self._flat_gradient)
        self._gradient, self._flat_gradient = {}, None
        self.expects_backward -= 1
        self._cache.release(self.block(TensorKind.GRADIENT), changed=True)
        self._release_weights()
        if self._kept_for_backward:
            self._kept_for_backward = False
            self._release_weights()

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        """Add the gradients that autograd accumulated to the block, and free them."""
        if parameter not in self._gradient:
            raise RuntimeError(f"layer {self.layer}, cluster index {self.local}: gradient outside of its backward pass")
        assert parameter.grad is not None
        self._gradient[parameter].add_(parameter.grad)
        parameter.grad = None

    def _load_weights(self) -> None:
        self._schedule.before_use(self)
        flat = self._cache.acquire(self.block(TensorKind.WEIGHT))
        self._uses += 1
        if self._uses == 1:
            self._weights = flat
            for name, view in self.layout.views(flat).items():
                self.parameters[name].data = view

    def _release_weights(self, changed: bool = False) -> None:
        self._uses -= 1
        if not self._uses:
            self._weights = None
            self._show_placeholders()
        self._cache.release(self.block(TensorKind.WEIGHT), changed=changed)

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
            raise RuntimeError(
                f"layer {self.layer}, cluster index {self.local}: weights are used while they are offloaded"
            )
        return torch.as_strided(self._weights, packed.size, packed.stride, packed.offset)


class _Enter(torch.autograd.Function):
    """Identity on a cluster's input: its last node in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cluster: OffloadedCluster, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.cluster = cluster
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.cluster.finish_backward()
        return None, None, *gradients


class _Leave(torch.autograd.Function):
    """Identity on a cluster's output: its first node in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cluster: OffloadedCluster, result: Tensor) -> Tensor:
        ctx.cluster = cluster
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.cluster.begin_backward()
        return None, gradient
