"""Numbers of parameters of a whole model, from the share of one rank."""

from dataclasses import dataclass

from moe_dist.distributed.agreement import gather_over_stages
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import SharedBase
from moe_dist.moe.dense_feed_forward import SharedExpert
from moe_dist.moe.parameter_class import ParameterClass, numbers_by_class


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of the whole model; replicas count once."""

    total: int
    expert: int
    """Parameters of bases, residuals and vectors, or of standard experts; with shared experts, without routers; 0 for
    dense layers."""
    expert_standard: int
    """Parameters that the same number of standard experts of the same width would have."""


def count_parameters(model: LanguageModel) -> ParameterCounts:
    """Count the model's parameters from the tensors of this rank's position in all pipeline stages; collective.

    Every rank of a stage holds equally many of each class.
    """
    config, shape = model.config, model.context.mesh.shape
    own = numbers_by_class(model.parameters())
    shared_parts = (part for part in model.modules() if isinstance(part, SharedBase | SharedExpert))
    shared = sum(parameter.numel() for part in shared_parts for parameter in part.parameters())
    stages = gather_over_stages(model.context.mesh, (own, shared))
    held = {kind: sum(of_stage[kind] for of_stage, _ in stages) for kind in ParameterClass}
    shared = sum(of_stage for _, of_stage in stages)
    dense = held[ParameterClass.DENSE] + held[ParameterClass.TENSOR] * shape.tensor
    base = held[ParameterClass.BASE] * shape.cluster
    expert = held[ParameterClass.EXPERT] * shape.cluster * shape.shard
    moe = config.moe
    standard = config.moe_layers * moe.layer_kind.standard_parameters(config.model.hidden_size, moe)
    return ParameterCounts(dense + base + expert, shared + base + expert, standard)
