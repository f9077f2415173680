"""Tensors of Megatron-core's optimizer and gradient buffers on machines without CUDA."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Leaves on the CPU what Megatron-core creates on a GPU, on machines without CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.cuda.is_available():
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return "torch.cuda.FloatTensor"  # the type that its optimizer wants
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs)
