"""Export of a run as a folder that transformers loads: sharded safetensors, config.json, tokenizer.

A model that a class of transformers computes gets that class; every other one our own, whose file is written beside it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.export import BALANCE, PREFIX, quantized_format
from moe_dist.checkpoint.file_groups import grouped_by_bytes
from moe_dist.checkpoint.manifest import Index, read_index
from moe_dist.checkpoint.new_folder import new_folder, require_space
from moe_dist.checkpoint.placement_record import placement_from_record
from moe_dist.checkpoint.quantized_tensors import dtype_to_quantize, is_of_cluster, quantized_tensors_of
from moe_dist.checkpoint.save_and_load import read_checkpoint
from moe_dist.checkpoint.sharded_tensor import ShardedTensor
from moe_dist.checkpoint.trained_weights import TrainedWeights
from moe_dist.compression import StorageFormat
from moe_dist.config import RunConfig, WorldShape
from moe_dist.data import Tokenizer
from moe_dist.data.tokenizer import SENTENCEPIECE_MODEL
from moe_dist.errors import CheckpointError
from moe_dist.integrations.huggingface.families import OUR_ARCHITECTURE, OUR_MODEL_TYPE, plain_family
from moe_dist.integrations.huggingface.family import Family
from moe_dist.integrations.huggingface.own_format import MODELING, own_keys, own_name, routing_state
from moe_dist.integrations.huggingface.sentencepiece_tokenizer import converted_files
from moe_dist.integrations.huggingface.source_folder import CONFIG, INDEX, WEIGHTS
from moe_dist.integrations.huggingface.tensor_links import links_of
from moe_dist.integrations.huggingface.transformers_library import require_transformers

LARGEST_FILE = 4 << 30
"""Target size of one file of weights, and so of the memory that an export takes, bytes."""


class Unit(NamedTuple):
    """One of our parameters, the type to read it in, and the function to the tensors that are written for it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    convert: Callable[[Tensor], Mapping[str, Tensor]]

    def nbytes(self) -> int:
        """Return the bytes of the written tensors."""
        written = self.convert(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return sum(tensor.nbytes for tensor in written.values())


@dataclass(frozen=True)
class ExportedModel:
    """Class that loads an exported folder, and its size."""

    architecture: str
    parameters: int
    nbytes: int


def export_model(
    weights: TrainedWeights,
    tokenizer: Tokenizer,
    target: Path,
    dtype: torch.dtype | None = None,
    *,
    quantized: bool = False,
    largest_file: int = LARGEST_FILE,
) -> ExportedModel:
    """Write a run's weights as the new folder `target`.

    Args:
        dtype: type of the values; None: float32, or with `quantized` the type that the run trained with.
        quantized: store low-rank factors in few bits, as the run's `precision` section configures.
        largest_file: limit of one file, bytes.

    Raises:
        MoeDistError: one line; nothing is left at `target`.
    """
    if weights.path.is_file():
        raise CheckpointError(f"{weights.path} is an exported file already: give its run or checkpoint")
    transformers = require_transformers()
    config, index = weights.config, read_index(weights.path)
    state = _routing_state(weights, index)
    stored = quantized_format(weights) if quantized else None
    plain = None if stored is not None else plain_family(config)
    if plain is not None and plain[0].selection_bias is not None:
        state = _plain_biases(plain[0], state)
    elif _has_biases(state):
        plain = None
    elif plain is not None:
        state = {}
    units = list(_units(config, weights.manifest.data.vocab_size, index, plain and plain[0], dtype, stored))
    architecture, model_type = (
        (plain[0].architecture, plain[0].model_type) if plain else (OUR_ARCHITECTURE, OUR_MODEL_TYPE)
    )
    with new_folder(target) as folder:
        require_space(folder, sum(unit.nbytes() for unit in units))
        nbytes = _write_weights(folder, weights.path, units, state, largest_file)
        keys = plain[1] if plain else own_keys(config, quantized)
        common = _common_keys(weights, tokenizer, architecture, dtype or torch.float32)
        if plain:
            transformers.CONFIG_MAPPING[model_type](**keys, **common).save_pretrained(folder)
        else:
            (folder / CONFIG).write_text(json.dumps({"model_type": model_type, **keys, **common}, indent=1) + "\n")
            (folder / MODELING.name).write_bytes(MODELING.read_bytes())
        for name, content in tokenizer_files(tokenizer).items():
            (folder / name).write_bytes(content)
    return ExportedModel(architecture, sum(torch.Size(unit.shape).numel() for unit in units), nbytes)


def _units(
    config: RunConfig,
    vocab_size: int,
    index: Index,
    family: Family | None,
    dtype: torch.dtype | None,
    stored: StorageFormat | None,
) -> Iterator[Unit]:
    """Yield what is written: tensors of a family, or for our own class (None) ours under our names."""
    dtype = dtype or (torch.float32 if stored is None else getattr(torch, config.train.precision))
    for link in links_of(config, vocab_size, family):

        def convert(value: Tensor, link: Any = link) -> Mapping[str, Tensor]:
            return dict(zip(link.theirs, link.split(value), strict=True))

        yield Unit(f"{PREFIX}{link.ours}", link.shape, dtype, convert)
    for key, record in index.tensors.items() if family is None else ():
        name = own_name(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if name is not None:

            def keep(value: Tensor, name: str = name) -> Mapping[str, Tensor]:
                return {name: value} if stored is None else quantized_tensors_of(name, value, stored)

            packed = stored is not None and is_of_cluster(name)
            yield Unit(key, tuple(record.shape), dtype_to_quantize(name, config) if packed else dtype, keep)


def _write_weights(
    folder: Path, checkpoint: Path, units: Sequence[Unit], state: Mapping[str, Tensor], largest_file: int
) -> int:
    """Write one file, or several with an index, one after another; return the bytes of all tensors."""
    groups = grouped_by_bytes(units, Unit.nbytes, largest_file)
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    files = files if len(files) > 1 else [WEIGHTS]
    where: dict[str, str] = {}
    total = 0
    for file, group in zip(files, groups, strict=True):
        tensors = _converted(checkpoint, group) | (dict(state) if file == files[-1] else {})
        save_file(tensors, folder / file, {"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")
    return total


def _converted(checkpoint: Path, units: Sequence[Unit]) -> dict[str, Tensor]:
    room = {unit.key: ShardedTensor.whole(torch.empty(unit.shape, dtype=unit.dtype)) for unit in units}
    read_checkpoint(checkpoint, room)
    tensors: dict[str, Tensor] = {}
    for unit in units:
        value = room[unit.key].shards[0].values.view(unit.shape)
        tensors |= {name: tensor.contiguous() for name, tensor in unit.convert(value).items()}
    return tensors


def _routing_state(weights: TrainedWeights, index: Index) -> dict[str, Tensor]:
    """Return selection biases and members of clusters by their exported names."""
    names = [key for key in index.tensors if key.startswith(BALANCE)]
    room = {key: ShardedTensor.whole(torch.empty(index.tensors[key].shape)) for key in names}
    read_checkpoint(weights.path, room)
    biases = {key.removeprefix(BALANCE): room[key].shards[0].values.view(room[key].shape) for key in names}
    placements = [placement_from_record(record, WorldShape(1, 1, 1)) for record in weights.manifest.placements]
    return routing_state(weights.config, placements, biases)


def _plain_biases(family: Family, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the selection biases by the names of a class that has them."""
    leaf = f".mlp.{family.selection_bias}"
    biases = {name: bias for name, bias in state.items() if name.endswith(".expert_bias_E")}
    return {name.replace(".mlp.expert_bias_E", leaf): bias for name, bias in biases.items()}


def _has_biases(state: Mapping[str, Tensor]) -> bool:
    return any(bool(tensor.any()) for name, tensor in state.items() if name.endswith("expert_bias_E"))


def _common_keys(
    weights: TrainedWeights, tokenizer: Tokenizer, architecture: str, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": weights.manifest.data.vocab_size,
        "bos_token_id": None,
        "eos_token_id": tokenizer.end_of_document,
        "pad_token_id": tokenizer.end_of_document,
    }


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files of a tokenizer, as transformers reads them; a SentencePiece model is converted."""
    if tokenizer.path.name == SENTENCEPIECE_MODEL:
        return converted_files(tokenizer.path)
    return tokenizer.files()
