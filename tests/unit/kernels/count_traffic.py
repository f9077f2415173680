"""Bytes that the hidden step reads and writes for each token, backend by backend.

    python -m tests.unit.kernels.count_traffic

Every tensor that an operation takes or gives is counted once, views not at all; a kernel counts as one operation, and
what it adds to as read and written. So caches are assumed to hold what an operation reads twice, and nothing between
operations. `saved`: what is kept for the backward pass. Nothing is timed, and no kernel runs.

Shapes: T tokens, F hidden width, N experts of the cluster, K slots, R rank; vectors on.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dist.compression import ClusterWeights
from moe_dist.kernels import lowrank_swiglu_triton as hidden_triton
from moe_dist.kernels.shared_base_experts import KERNELS

T, F, N, R = 4096, 1408, 8, 8
ADDED_TO = {"forward": 1, "backward": 6}  # the last of the kernels' tensors


class Traffic(TorchDispatchMode):
    """Adds up the bytes of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        moves = any(x.untyped_storage().data_ptr() not in given for x in made) or func.__name__.split(".")[0][-1] == "_"
        if moves and "empty" not in func.__name__:
            read = () if "new_" in func.__name__ or "_like" in func.__name__ else (args, kwargs)
            self.bytes += sum(x.nbytes for x in (*tree_leaves(read), *made) if isinstance(x, Tensor))
        return result

    def launched(self, name: str, grid: Any, arguments: Any, *_: Any) -> None:
        """A kernel, in place of its run."""
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        self.bytes += sum(x.nbytes for x in tensors) + sum(x.nbytes for x in tensors[-ADDED_TO[name] :])


def counted(backend: str, slots: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Bytes a token: forward, backward, saved."""
    shapes = {"pre": (T, 2 * F), "z": (T, N, 2 * R), "gate": (T, slots), "in_v_NRH": (N, 2, R, F)}
    shapes |= {"out_u_NFR": (N, F, R), "hidden_gate_NF": (N, F), "hidden_bias_NH": (N, 2 * F)}
    leaves = {name: torch.zeros(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    slot_TK = torch.rand(T, N).argsort(1)[:, :slots]
    own = {name: x for name, x in leaves.items() if "_" in name}
    unused = dict.fromkeys(("base_in_DH", "base_out_FD", "in_u_NDR", "out_v_NRD"), leaves["pre"])
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    forward, backward = Traffic(), Traffic()
    weights, keeping = ClusterWeights(**own, **unused), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with mock.patch.object(hidden_triton, "_launch", forward.launched), forward, keeping:
        outputs = KERNELS[backend](leaves["pre"], leaves["z"], slot_TK, leaves["gate"], weights)
    d_outputs = [torch.zeros_like(x) for x in outputs]
    with mock.patch.object(hidden_triton, "_launch", backward.launched), backward:
        torch.autograd.grad(outputs, list(leaves.values()), d_outputs)
    return forward.bytes / T, backward.bytes / T, sum(saved.values()) / T


if __name__ == "__main__":
    torch.manual_seed(0)
    print("backend      k  dtype      forward  backward     saved   bytes a token")
    for dtype in (torch.bfloat16, torch.float32):
        for slots in (2, 4):
            for backend in ("masked", "triton"):
                figures = "".join(f"{x:10,.0f}" for x in counted(backend, slots, dtype))
                print(f"{backend:9} {slots}  {str(dtype)[6:]:8}{figures}")
