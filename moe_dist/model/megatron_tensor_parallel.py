"""Tensor and sequence parallelism of Megatron-core on any device, and its parameters' class.

Megatron-core allocates the results of its collectives on the current CUDA device and forks CUDA's random state around
dropout. Without CUDA both are replaced for the process; the model has no dropout, so nothing random is lost.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import nn

from moe_dist.errors import ConfigError
from moe_dist.moe.parameter_class import ParameterClass, mark_parameter


def check_vocabulary(vocab_size: int, tensor: int) -> None:
    """Reject a vocabulary that does not divide over the tensor group.

    Raises:
        ConfigError: it does not.
    """
    if vocab_size % tensor:
        raise ConfigError(
            f"the tokenizer's {vocab_size} tokens are not divisible by world.tensor={tensor}: train a tokenizer with "
            f"tokenizer.vocab_size={vocab_size // tensor * tensor}, or change world.tensor"
        )


def install_stand_ins() -> None:
    """Make Megatron-core's tensor-parallel modules work in this process without CUDA."""
    megatron_random._CUDA_RNG_STATE_TRACKER = _NoRandomState()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # Megatron-core 0.16 calls collectives by names that torch 2.13 deprecates, and advises on CUDA's connections
    warnings.filterwarnings("ignore", "`torch.distributed.*_tensor` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "When using sequence parallelism", UserWarning)
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


class _NoRandomState:
    """Tracker of random states for a model without dropout."""

    @contextmanager
    def fork(self, *_: Any) -> Iterator[None]:
        """Change nothing."""
        yield


def mark_shards(gpt: nn.Module) -> None:
    """Set the class of the parameters that Megatron-core divides over the tensor group."""
    for parameter in gpt.parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            mark_parameter(parameter, ParameterClass.TENSOR)


def divided_dimension(parameter: nn.Parameter) -> int:
    """Return the dimension in which a parameter of class TENSOR is divided over the tensor group."""
    dimension: int = parameter.partition_dim  # type: ignore[attr-defined]
    return dimension
