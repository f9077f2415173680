"""Generation of text by transformers from an exported folder, or from a run, which is exported for the time."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.errors import CheckpointError
from moe_dist.evaluation.trained_model import tokenizer_of
from moe_dist.integrations.huggingface.export_model import export_model
from moe_dist.integrations.huggingface.registered import register
from moe_dist.integrations.huggingface.source_folder import CONFIG
from moe_dist.integrations.huggingface.transformers_library import require_transformers


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a generation.

    Attributes:
        temperature: 0 takes the most likely token each time.
        chat: True if a prompt is a user's message, put into the tokenizer's chat template.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


def generate(run: Path, prompts: Sequence[str], options: GenerationOptions, stream: bool = False) -> list[str]:
    """Return the continuation of each prompt, all computed as one batch.

    Args:
        run: folder of a run, a checkpoint, or an export.
        stream: also print the continuation of a single prompt token by token.

    Raises:
        MoeDistError: the run cannot be exported, or the tokenizer has no chat template.
    """
    transformers = require_transformers()
    register()
    with exported(run) as folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = model.to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [_as_chat(tokenizer, prompt) for prompt in prompts] if options.chat else list(prompts)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    torch.manual_seed(options.seed)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.no_grad():
        ids_BS = model.generate(**batch.to(device), streamer=streamer, **_keywords(options, tokenizer))
    start = batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(ids_BS[:, start:], skip_special_tokens=True)
    return list(texts)


@contextmanager
def exported(run: Path) -> Iterator[Path]:
    """Yield the folder that transformers loads: `run` itself if it is one, else a temporary export."""
    if (run / CONFIG).is_file():
        yield run
        return
    weights = find_weights(run)
    print(f"reading the weights of {weights.path}", file=sys.stderr, flush=True)  # which may take a while
    with TemporaryDirectory(prefix="moe-dist-") as scratch:
        export_model(weights, tokenizer_of(run, weights), Path(scratch) / "model")
        yield Path(scratch) / "model"


def _as_chat(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        raise CheckpointError("the tokenizer has no chat template: leave --chat out")
    message = {"role": "user", "content": prompt}
    text: str = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return text


def _keywords(options: GenerationOptions, tokenizer: Any) -> dict[str, Any]:
    drawn = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    chosen = (
        drawn if options.temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    return {**chosen, "max_new_tokens": options.max_tokens, "pad_token_id": tokenizer.pad_token_id}
