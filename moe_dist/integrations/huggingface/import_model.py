"""Import of a Hugging Face checkpoint as a run, as it is or with other feed-forward layers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.new_folder import new_folder
from moe_dist.config import RunConfig, load_config
from moe_dist.data import Tokenizer, open_tokenizer
from moe_dist.data.hf_tokenizer import find_hf_tokenizer
from moe_dist.distributed.init import shutdown
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.integrations.huggingface.compress_mixture import CalibrationText, compress_layers, compressed, layer_store
from moe_dist.integrations.huggingface.expert_budget import words_within_budget
from moe_dist.integrations.huggingface.families import OUR_ARCHITECTURE, OUR_MODEL_TYPE, family_of
from moe_dist.integrations.huggingface.gguf_file import as_folder
from moe_dist.integrations.huggingface.hub_model import hub_folder, is_hub_name
from moe_dist.integrations.huggingface.import_spec import ImportOptions, ImportSpec
from moe_dist.integrations.huggingface.imported_tensors import (
    ConvertedModel,
    ImportedModel,
    copied,
    selection_biases,
    upcycled,
)
from moe_dist.integrations.huggingface.layer_store import remove_store
from moe_dist.integrations.huggingface.own_format import own_sections, own_tensors, read_routing_state
from moe_dist.integrations.huggingface.source_folder import SourceFolder
from moe_dist.integrations.huggingface.tensor_links import links_of
from moe_dist.integrations.huggingface.write_run import write_run

LEARNING_RATE = 1e-4
"""Default of an imported run: far below that of random weights."""
MAY_CHANGE = {"sequence_length", "init_std", "activation_checkpointing"}
"""Keys of `model` that a word may change, since they leave the function as it is."""


@dataclass(frozen=True)
class ImportedRun:
    """Imported run.

    Attributes:
        output_errors: relative error of each expert's output on held-out tokens, by layer; empty if not compressed.
    """

    config: RunConfig
    architecture: str
    parameters: int
    output_errors: Sequence[Sequence[float]]


def import_on_ranks(config: RunConfig | None, spec: ImportSpec) -> None:
    """Import a model as one of the ranks of a job, and print what came out; they share the layers of a compression."""
    wanted = spec.source, spec.target, spec.words, spec.options
    try:
        if int(os.environ.get("RANK", "0")):
            help_import(*wanted)
            return
        done = import_model(*wanted)
    finally:
        shutdown()  # of a compression
    moe = done.config.moe
    print(f"{spec.target}: {done.architecture}, {done.parameters:,} parameters, {moe.layer_kind.describe(moe)}")
    for layer, errors in enumerate(done.output_errors):
        mean = sum(errors) / len(errors)
        print(f"layer {layer}: relative error of the experts' outputs {mean:.3f}, largest {max(errors):.3f}")


def import_model(source: Path, target: Path, words: Sequence[str], options: ImportOptions) -> ImportedRun:
    """Write a checkpoint as the run `target`, with the configuration of its family and changes by `words`.

    With moe.kind=clustered or standard a dense model is upcycled, and with moe.kind=clustered a mixture is compressed.

    Args:
        source: folder of config.json and safetensors, a GGUF file, or a model's name on the Hugging Face hub.
        words: `key.sub=value` settings.

    Raises:
        MoeDistError: one line; nothing is left at `target`, nor beside it.
    """
    try:
        with new_folder(target) as folder, as_folder(_local(source), folder.parent) as found:
            done = _import_into(folder, found, target, words, options)
    except MoeDistError:
        remove_store(target)
        raise
    remove_store(target)
    return done


def _import_into(folder: Path, found: Path, target: Path, words: Sequence[str], options: ImportOptions) -> ImportedRun:
    checkpoint = SourceFolder(found)
    tokenizer, plain, config = _opened(checkpoint, target, words, options)
    model = _converted(plain, config, checkpoint, tokenizer, options, target)
    write_run(folder, config, plain.vocab_size, model, tokenizer)
    parameters = sum(prod(tensor.shape) for tensor in model.tensors.values())
    architecture = plain.family.architecture if plain.family else OUR_ARCHITECTURE
    return ImportedRun(config, architecture, parameters, model.output_errors)


def _local(source: Path) -> Path:
    return hub_folder(str(source)) if is_hub_name(source) else source


def help_import(source: Path, target: Path, words: Sequence[str], options: ImportOptions) -> None:
    """Compress layers that `import_model`, in another process, has not begun; arguments as there."""
    if source.suffix == ".gguf":
        return  # of a dense model
    checkpoint = SourceFolder(_local(source))
    tokenizer, plain, config = _opened(checkpoint, target, words, options)
    if _is_compression(plain, config):
        calibration = CalibrationText(options.text, options.tokens)
        store = layer_store(target, config, checkpoint, calibration)
        compress_layers(config, plain, checkpoint, tokenizer, calibration, store)
        if store.finished:  # by the first rank, which has removed the store
            remove_store(target)


def _opened(
    checkpoint: SourceFolder, target: Path, words: Sequence[str], options: ImportOptions
) -> tuple[Tokenizer, ImportedModel, RunConfig]:
    """Return the tokenizer, the model as it is, and the configuration of the run, after checking that they fit."""
    tokenizer = open_tokenizer(find_hf_tokenizer(str(checkpoint.folder)))
    plain, config = _configurations(checkpoint, target.absolute(), words, options.keep)
    config.tokenizer.embedding_rows(tokenizer.vocab_size)
    links = list(links_of(plain.config, plain.vocab_size, plain.family))
    checkpoint.require({name: shape for link in links for name, shape in link.theirs.items()})
    return tokenizer, plain, config


def _is_compression(plain: ImportedModel, config: RunConfig) -> bool:
    """Return True if a mixture is to become clusters."""
    routed = plain.family is not None and plain.config.moe.layer_kind.routed
    return routed and plain.config.moe.kind != config.moe.kind


def _configurations(
    checkpoint: SourceFolder, run: Path, words: Sequence[str], keep: float | None
) -> tuple[ImportedModel, RunConfig]:
    """Return the model as it is, and the configuration of the run.

    Raises:
        ConfigError: the model is not supported, or a word would change what it computes.
    """
    hf = checkpoint.hf
    if hf.get("quantization_config"):
        raise ConfigError(f"{checkpoint.folder}: weights quantized by {hf['quantization_config']} are not supported")
    ours = hf.get("model_type") == OUR_MODEL_TYPE
    family = None if ours else family_of(hf)
    tree: dict[str, Any] = {
        "name": run.name,
        "runs_dir": str(run.parent),
        "tokenizer": {"kind": "hf", "path": str(run), "vocab_size": hf["vocab_size"]},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "checkpoint": {"init": str(run)},
        **(own_sections(hf) if family is None else family.sections(hf)),
    }
    plain = load_config(None, (), tree)
    config = load_config(None, words if keep is None else words_within_budget(plain, words, keep), tree)
    _require_same_model(plain, config)
    return ImportedModel(plain, family, hf["vocab_size"]), config


def _require_same_model(plain: RunConfig, config: RunConfig) -> None:
    for section, keys in (
        ("model", set(type(plain.model).model_fields) - MAY_CHANGE),
        ("moe", set(_fixed(plain, config))),
    ):
        for key in sorted(keys):
            own, wanted = getattr(getattr(plain, section), key), getattr(getattr(config, section), key)
            if own != wanted:
                raise ConfigError(f"{section}.{key}={wanted} is not that of the model, {own}: leave it out")


def _fixed(plain: RunConfig, config: RunConfig) -> Sequence[str]:
    """Return the keys of `moe` that an import cannot change."""
    always = ("expert_hidden", "dense_hidden", "dense_layers", "score", "gate_scale", "normalize_gates")
    shared = ("shared_expert_hidden", "shared_expert_gate")
    if plain.moe.kind == config.moe.kind:
        routed = ("experts", "top_k", "clusters", "top_clusters", "rank", "base", "base_rank", "expert_vectors")
        groups = ("groups", "top_groups")
        return (*always, *shared, *(routed + groups if plain.moe.layer_kind.routed else ()))
    if plain.moe.kind == "dense":
        return (*always, *shared)
    if not config.moe.layer_kind.clustered:
        raise ConfigError(f"moe.kind={config.moe.kind}: a mixture can be imported as standard or clustered experts")
    return (*always, *shared, "experts")


def _converted(
    plain: ImportedModel,
    config: RunConfig,
    checkpoint: SourceFolder,
    tokenizer: Tokenizer,
    options: ImportOptions,
    target: Path,
) -> ConvertedModel:
    """Return the model of the run."""  # fmt: skip
    if plain.config.moe.kind == config.moe.kind:
        tensors = copied(links_of(plain.config, plain.vocab_size, plain.family), checkpoint)
        if plain.family is not None:
            return ConvertedModel(tensors, biases=selection_biases(plain, checkpoint))
        placements, biases = read_routing_state(config, checkpoint)
        return ConvertedModel(tensors | own_tensors(config, checkpoint), placements, biases=biases)
    if plain.family is None:
        raise ConfigError(
            f"moe.kind={config.moe.kind}: the model is {plain.config.moe.kind} and of our own class: leave it out"
        )
    if _is_compression(plain, config):
        calibration = CalibrationText(options.text, options.tokens)
        store = layer_store(target, config, checkpoint, calibration)
        while missing := store.missing():
            compress_layers(config, plain, checkpoint, tokenizer, calibration, store)
            for layer in missing:
                store.wait(layer)
        return compressed(config, plain, checkpoint, store)
    if config.moe.two_level_base:
        raise ConfigError(f"moe.base={config.moe.base} compresses a mixture, but the model is dense: use cluster")
    if config.moe.kind == "standard" and config.moe.top_k == 1:
        raise ConfigError("moe.top_k=1 with moe.kind=standard scales a copy by its probability: must be >= 2")
    return upcycled(config, plain, checkpoint, options.noise)
