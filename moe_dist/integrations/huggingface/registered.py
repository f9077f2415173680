"""Registration of our class with transformers, so that exported folders load without remote code."""

from moe_dist.integrations.huggingface.families import OUR_MODEL_TYPE
from moe_dist.integrations.huggingface.transformers_library import require_transformers


def register() -> None:
    """Make `AutoModelForCausalLM.from_pretrained` load exported folders with the class of this package.

    Raises:
        ConfigError: transformers is not installed.
    """
    transformers = require_transformers()
    from moe_dist.integrations.huggingface.modeling_moe_dist import MoeDistConfig, MoeDistForCausalLM

    transformers.AutoConfig.register(OUR_MODEL_TYPE, MoeDistConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(MoeDistConfig, MoeDistForCausalLM, exist_ok=True)
