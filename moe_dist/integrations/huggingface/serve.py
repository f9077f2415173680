"""Server of a trained model with the HTTP interface of OpenAI, by `transformers serve`."""

from pathlib import Path
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.integrations.huggingface.families import OUR_ARCHITECTURE
from moe_dist.integrations.huggingface.generate import exported
from moe_dist.integrations.huggingface.registered import register
from moe_dist.integrations.huggingface.transformers_library import require_transformers


def serve(run: Path, host: str, port: int, **options: Any) -> Any:
    """Serve a model until the process is interrupted; return the server where `non_blocking=True` is given.

    Args:
        run: folder of a run, a checkpoint, or an export; the last is the name of the model in requests.
        options: further ones of `transformers serve`.

    Raises:
        ConfigError: transformers lacks the packages of its server.
    """
    transformers = require_transformers()
    if not transformers.utils.import_utils.is_serve_available():
        raise ConfigError("serving needs more packages: pip install 'moe-dist[serve]'")
    from transformers.cli.serve import Serve

    from moe_dist.integrations.huggingface.modeling_moe_dist import MoeDistForCausalLM

    register()
    setattr(transformers, OUR_ARCHITECTURE, MoeDistForCausalLM)  # where the server looks for a class
    with exported(run) as folder:
        return Serve(force_model=str(folder), host=host, port=port, **options)
