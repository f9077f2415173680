"""Checks of what a run takes from other runs before any rank starts: weights of the same shapes, and a tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_dist.config import RunConfig
from moe_dist.config.initial_run import MANIFEST, TOKENIZER_JSON, TOKENIZER_MODEL, initial_settings
from moe_dist.config.sections.checkpoint import RESUME_WORDS
from moe_dist.errors import ConfigError

SHAPE_OF_MODEL = (
    "layers", "hidden_size", "heads", "kv_heads", "head_dim", "latent", "qkv_bias", "qk_norm", "tie_embeddings",
)  # fmt: skip
SHAPE_OF_EXPERTS = (
    "kind", "experts", "clusters", "expert_hidden", "dense_hidden", "dense_layers", "rank", "base", "base_rank",
    "expert_vectors", "shared_expert_hidden", "shared_expert_gate",
)  # fmt: skip
"""Keys below `model` and `moe` that decide which weights there are, and their shapes."""


def tokenizer_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for a tokenizer that is not at its configured path."""
    path = config.tokenizer.path
    if path is None:
        return
    hf = config.tokenizer.kind == "hf"
    folder, on_hub = Path(path), hf and path.count("/") == 1 and path[0] not in "/.~"
    if not hf and not (folder / TOKENIZER_MODEL).is_file():
        yield f"tokenizer.path={path} holds no {TOKENIZER_MODEL}: give the folder of a run, or set tokenizer.kind=hf"
    elif not folder.exists() and not on_hub:
        yield f"tokenizer.path={path} does not exist: give a folder with a {TOKENIZER_JSON}"
    elif hf and folder.is_dir() and not (folder / TOKENIZER_JSON).is_file():
        yield f"tokenizer.path={path} holds no {TOKENIZER_JSON}: give the folder of a Hugging Face tokenizer"
    elif hf and folder.is_dir():
        try:
            config.tokenizer.embedding_rows(_number_of_ids(folder / TOKENIZER_JSON))
        except ConfigError as error:
            yield str(error)


def _number_of_ids(file: Path) -> int:
    """Return one more than the largest id of a Hugging Face tokenizer; 0: the file is of an unknown form."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]  # pieces with their ids, or in the order of them
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens") or ())], default=-1)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def weight_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for every path to a run or checkpoint that holds none, or holds another model."""
    resume, given = config.checkpoint.resume, [("checkpoint.init", config.checkpoint.init)]
    if resume not in RESUME_WORDS:
        given.append(("checkpoint.resume", resume))
    for key, path in given:
        if path is None:
            continue
        folder = Path(path)
        if not folder.exists():
            yield f"{key}={path} does not exist: give the folder of a run or a checkpoint, such as runs/NAME"
        elif not folder.is_dir():
            yield f"{key}={path} is a file: give the folder of a run or of a checkpoint, such as runs/NAME"
        elif (folder / "config.json").is_file() and not _holds_checkpoint(folder):
            yield (
                f"{key}={path} is a model of Hugging Face: make a run of it with `moe-dist import {path} -o RUN`, "
                f"then give {key}=RUN"
            )
        elif not _holds_checkpoint(folder):
            yield f"{key}={path} holds no checkpoint: give the folder of a run that has saved one, or of a checkpoint"
        elif key == "checkpoint.resume" and _holds_weights_alone(folder):
            yield f"{key}={path} holds weights only: start a new run from it with checkpoint.init={path}"
        elif others := _other_shapes(folder, config):
            yield f"{key}={path} holds another model: {', '.join(others)}; give the values that are there"
    teacher = config.distill.teacher
    if teacher is not None and not Path(teacher).exists():
        yield f"distill.teacher={teacher} does not exist: give the folder of a run, or of stored predictions"


def _holds_checkpoint(folder: Path) -> bool:
    saved = folder / "checkpoints"
    return any((place / MANIFEST).is_file() for place in (folder, folder / "final")) or (
        saved.is_dir() and any(saved.glob("step-*"))
    )


def _holds_weights_alone(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"] == "weights")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _other_shapes(weights: Path, config: RunConfig) -> list[str]:
    """Return a few words for each key by which weights do not fit the configuration.

    None where that is not known: their run's configuration is not there, is of another version, or has a standard
    warm-up, so that the kind of their experts depends on their step.
    """
    try:
        then = RunConfig.model_validate(initial_settings(str(weights)))
    except (ConfigError, ValueError):
        return []
    now = config.phase_after(0)
    if then.standard_steps:
        return []
    pairs = [(f"model.{key}", getattr(then.model, key), getattr(now.model, key)) for key in SHAPE_OF_MODEL]
    kinds = [(run.moe.kind, run.moe.layer_kind.parameters(run.model.hidden_size, run.moe, 1, 1)) for run in (then, now)]
    if kinds[0] != kinds[1]:
        pairs += [(f"moe.{key}", getattr(then.moe, key), getattr(now.moe, key)) for key in SHAPE_OF_EXPERTS]
    return [f"{key} is {there} there, {here} here" for key, there, here in pairs if there != here]
