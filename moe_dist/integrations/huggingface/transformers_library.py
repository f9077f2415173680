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
    for name in ("torch.utils._pytree", "torchao"):  # transformers imports torchao, which logs what it lacks
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
