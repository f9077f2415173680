"""Initial values of the backbone, drawn by parameter name: the same in every layout of ranks."""

import torch
from torch import nn

from moe_dist.config import ModelConfig
from moe_dist.model.megatron_tensor_parallel import divided_dimension
from moe_dist.moe.init_generator import generator
from moe_dist.moe.parameter_class import ParameterClass, class_of

ADDS_TO_RESIDUAL_STREAM = "self_attention.linear_proj.weight"


@torch.no_grad()
def draw_initial_values(gpt: nn.Module, model: ModelConfig, seed: int, tensor: int, part: int) -> None:
    """Draw matrices from normal distributions, and set biases to 0; norms keep their ones.

    Feed-forward layers, which are ours, have drawn their own.

    Args:
        tensor: number of tensor-parallel parts.
        part: this rank's part, of parameters of class TENSOR.
    """
    for name, parameter in gpt.named_parameters():
        if ".mlp." in name:
            continue
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.ndim > 1:
            std = model.output_init_std if name.endswith(ADDS_TO_RESIDUAL_STREAM) else model.init_std
            divided = class_of(parameter) is ParameterClass.TENSOR
            dimension = divided_dimension(parameter) if divided else 0
            shape = list(parameter.shape)
            shape[dimension] *= tensor if divided else 1
            whole = torch.normal(0.0, std, tuple(shape), generator=generator(seed, 0, name, 0))
            parameter.copy_(whole.chunk(tensor, dimension)[part] if divided else whole)
