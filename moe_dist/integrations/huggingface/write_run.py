"""Folder of an imported run: configuration, tokenizer, and final weights of step 0."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.manifest import WEIGHT, DataRecord, Manifest
from moe_dist.checkpoint.new_folder import require_space
from moe_dist.checkpoint.placement_record import placement_to_record
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.sharded_tensor import OffloadedShard, ShardedTensor, State
from moe_dist.checkpoint.store import FINAL
from moe_dist.config import RunConfig, dump_config
from moe_dist.data import Tokenizer
from moe_dist.integrations.huggingface.imported_tensors import ConvertedModel, LazyTensor
from moe_dist.metrics import installed_versions


def write_run(
    folder: Path,
    config: RunConfig,
    vocab_size: int,
    model: ConvertedModel,
    tokenizer: Tokenizer,
) -> None:
    """Write a run's configuration, tokenizer and weights into an empty folder.

    Raises:
        CheckpointError: there is no space, or a tensor cannot be read.
    """
    require_space(folder, 4 * sum(torch.Size(tensor.shape).numel() for tensor in model.tensors.values()))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        kind="weights",
        step=0,
        ranks=1,
        config=config.model_dump(mode="json"),
        data=DataRecord(train_checksum=0, validation_checksum=0, vocab_size=vocab_size, next_step=0),
        placements=[placement_to_record(placement) for placement in model.placements],
        versions=installed_versions(),
    )
    write_checkpoint(folder / FINAL, manifest, {**_weights(model.tensors), **_biases(config, model.biases)}, rank=0)


def _weights(tensors: Mapping[str, LazyTensor]) -> State:
    return {f"{WEIGHT}/{name}": _written_when_read(tensor) for name, tensor in tensors.items()}


def _written_when_read(tensor: LazyTensor) -> ShardedTensor:
    def read() -> Tensor:
        return tensor.read().float().contiguous().view(-1)

    def write(start: int, values: Tensor) -> None:
        raise NotImplementedError("an imported tensor is only read")

    size = torch.Size(tensor.shape).numel()
    return ShardedTensor(tensor.shape, torch.float32, [OffloadedShard(0, size, torch.float32, read, write)])


def _biases(config: RunConfig, known: Mapping[str, Tensor]) -> State:
    layers, moe = config.moe_layers, config.moe
    zero = {"cluster_bias_LG": torch.zeros(layers, moe.clusters), "expert_bias_LE": torch.zeros(layers, moe.experts)}
    return {f"part/balance/{name}": ShardedTensor.whole(bias) for name, bias in {**zero, **known}.items()}
