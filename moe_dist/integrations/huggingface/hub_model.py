"""Models on the Hugging Face hub: the files that an import reads, from the local cache or downloaded."""

import re
from pathlib import Path

from moe_dist.data.hf_tokenizer import COMPANIONS, TOKENIZER_JSON
from moe_dist.errors import CheckpointError

FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", TOKENIZER_JSON, *COMPANIONS)
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_hub_name(source: Path) -> bool:
    """Return True if a path that does not exist has the form of a model's name, organization/name."""
    return not source.exists() and _NAME.fullmatch(str(source)) is not None


def hub_folder(name: str) -> Path:
    """Return the folder of a model in the hub's cache; what is missing there is downloaded, and no code.

    Raises:
        CheckpointError: the hub has no such model, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of many classes: no such name, no network, no access
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} is no folder, and the Hugging Face hub does not give it: {reason}: give a folder, or a name in "
            "the cache (HF_HOME)"
        ) from error
