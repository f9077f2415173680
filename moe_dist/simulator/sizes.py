"""Parameters of a rank: formulas over the configuration."""

from moe_dist.config import RunConfig, WorldShape
from moe_dist.config.token_work import attention_parameters, head_norms, require_known
from moe_dist.moe.parameter_class import ParameterClass


def parameters_on_rank(
    config: RunConfig, shape: WorldShape, vocabulary: int, stage: int = 0
) -> dict[ParameterClass, int]:
    """Return the number of parameters of each class on one rank of a pipeline stage."""
    require_known(config)
    model, moe = config.model, config.moe
    d, last = model.hidden_size, stage == shape.pipeline - 1
    layers = model.layers // shape.pipeline
    embedding = vocabulary * d * ((stage == 0) + (last and not model.tie_embeddings))
    layer = moe.layer_kind.parameters(d, moe, shape.cluster, shape.shard, shape.sliced)
    norms = head_norms(model)
    divided = embedding + layers * (attention_parameters(model) - norms)
    dense = d * last + layers * (norms + 2 * d + layer.dense)
    if shape.tensor == 1:
        dense, divided = dense + divided, 0
    return {
        ParameterClass.DENSE: dense,
        ParameterClass.TENSOR: divided // shape.tensor,
        ParameterClass.BASE: layers * layer.base,
        ParameterClass.EXPERT: layers * layer.expert,
    }


def matrices_on_rank(config: RunConfig, shape: WorldShape) -> dict[ParameterClass, int]:
    """Return the number of elements of matrices that Muon updates, of each class, on one rank of a pipeline stage."""
    model, moe, layers = config.model, config.moe, config.model.layers // shape.pipeline
    d, kind = model.hidden_size, moe.layer_kind
    layer = kind.parameters(d, moe, shape.cluster, shape.shard)
    router = d * (moe.experts + moe.shared_expert_gate) if kind.routed else 0
    attention = attention_parameters(model.model_copy(update={"qkv_bias": False})) - head_norms(model)
    return {
        ParameterClass.DENSE: layers * (attention + layer.dense - router),
        ParameterClass.BASE: 0 if moe.two_level_base else layers * layer.base,
        ParameterClass.EXPERT: 0 if kind.clustered else layers * layer.expert,
    }
