"""GGUF files: read by transformers, and saved as a folder of safetensors that is imported like any other."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moe_dist.errors import CheckpointError
from moe_dist.integrations.huggingface.transformers_library import require_transformers


@contextmanager
def as_folder(source: Path, scratch: Path) -> Iterator[Path]:
    """Yield the folder of a checkpoint: `source` itself, or a temporary one in `scratch` for a GGUF file.

    Raises:
        CheckpointError: the file cannot be read as GGUF.
    """
    if source.suffix != ".gguf":
        yield source
        return
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist: give a .gguf file or a folder with config.json")
    with TemporaryDirectory(dir=scratch, prefix=".gguf-") as folder:
        _dequantize(source, Path(folder))
        yield Path(folder)


def _dequantize(source: Path, folder: Path) -> None:
    transformers = require_transformers()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        plain = transformers.GgufConfig(gguf_file=source.name, dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=plain, trust_remote_code=False
        )
        model.hf_quantizer = None  # the weights are plain; with it they could not be saved
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"{source}: {' '.join(str(error).split())[:300]}") from error
    except (ValueError, KeyError, RuntimeError, ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} cannot be read as GGUF: {reason}") from error
