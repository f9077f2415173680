"""Import of the library `transformers` at the first use: it is optional, and takes seconds."""

import logging
from typing import Any

from moe_dist.errors import ConfigError


def require_transformers() -> Any:
    """Import transformers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"models of Hugging Face need the package transformers ({error}): pip install 'moe-dist[models]'"
        ) from error
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # advice to torchao, which transformers imports
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
