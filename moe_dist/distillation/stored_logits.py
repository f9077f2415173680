"""Folder of a teacher's stored predictions: for each token of a prepared text the likeliest next tokens.

    teacher.json  train.tokens.npy  train.log_probs.npy  train.losses.npy  validation.tokens.npy  ...

The log-probabilities of K tokens and of all others together are float16, their ids uint16 or uint32: 4 K + 2 bytes a
token of the text for up to 65,536 ids.

Shapes: N sequences of the file, B sequences, S tokens, K likeliest tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_dist.config import RunConfig
from moe_dist.data import PreparedData
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.model.teacher_loss import TeacherTargets, with_rest

FACTS = "teacher.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
ARRAYS = ("tokens", "log_probs", "losses")


@dataclass(frozen=True)
class StoredFacts:
    """Properties of stored predictions that a run must share.

    Attributes:
        train_checksum, validation_checksum: checksums of the token files.
        teacher: folder that the teacher's weights were read from.
        step: its last step of training.
    """

    train_checksum: int
    validation_checksum: int
    vocab_size: int
    sequence_length: int
    document_mask: bool
    packing: str
    temperature: float
    top_k: int
    teacher: str
    step: int


def facts_of(config: RunConfig, data: PreparedData, top_k: int, step: int) -> StoredFacts:
    """Return the facts of predictions for a run's text."""
    return StoredFacts(
        data.train.checksum, data.validation.checksum, data.vocab_size, config.model.sequence_length,
        config.corpus.document_mask, config.corpus.packing, config.distill.temperature, top_k,
        str(config.distill.teacher), step,
    )  # fmt: skip


def stored_bytes(facts: StoredFacts, sequences: int) -> int:
    """Return the bytes of the predictions for a number of sequences."""
    id_bytes = np.dtype(_id_type(facts)).itemsize
    return sequences * (facts.sequence_length * (facts.top_k * (id_bytes + 2) + 2) + 4)


def _id_type(facts: StoredFacts) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if facts.vocab_size <= 1 << 16 else np.uint32


def is_stored(folder: Path) -> bool:
    """Return True if a folder holds stored predictions."""
    return (folder / FACTS).is_file()


class StoredTeacher:
    """Predictions that are read when they are needed."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> None:
        self._arrays, self._device = arrays, device

    @classmethod
    def open(cls, folder: Path, config: RunConfig, data: PreparedData, device: torch.device) -> Self:
        """Open predictions for the text of a run.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: they are of other text, or at another temperature.
        """
        try:
            facts = StoredFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
            arrays = {
                f"{split}.{name}": np.load(folder / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)
                for split in SPLITS
                for name in ARRAYS
            }
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"distill.teacher={folder} cannot be read: {' '.join(str(error).split())}") from error
        _require_same_text(folder, facts, facts_of(config, data, facts.top_k, facts.step))
        return cls(arrays, device)

    def targets(self, split: Split, index_B: npt.NDArray[np.int64], sequence_BS: Tensor) -> TeacherTargets:
        """Return the predictions for the sequences of these indices."""
        tokens, log_probs, losses = (torch.from_numpy(self._read(split, name, index_B)) for name in ARRAYS)
        log_prob_BSK = log_probs.to(self._device).float().log_softmax(dim=-1)  # undoes what float16 has rounded
        return TeacherTargets(log_prob_BSK, tokens.to(self._device), losses.to(self._device))

    def _read(self, split: Split, name: str, index_B: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        values = self._arrays[f"{split}.{name}"][index_B]
        return {"tokens": values.astype(np.int64), "losses": values.astype(np.float64)}.get(name, values)


def _require_same_text(folder: Path, then: StoredFacts, now: StoredFacts) -> None:
    remedies = {
        "vocab_size": "the vocabulary", "sequence_length": "model.sequence_length",
        "document_mask": "corpus.document_mask", "packing": "corpus.packing", "temperature": "distill.temperature",
        "train_checksum": "the text of corpus.* or its tokenizer", "validation_checksum": "the validation text",
    }  # fmt: skip
    for key, what in remedies.items():
        stored, wanted = getattr(then, key), getattr(now, key)
        if stored != wanted:
            raise ConfigError(
                f"distill.teacher={folder} was stored for another {key} ({stored}, this run has {wanted}): {what} must "
                "be the same, or store it again"
            )


class StoredWriter:
    """Writer of predictions; ranks write different sequences of the same files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, facts: StoredFacts, sequences: Mapping[Split, int]) -> None:
        """Create all files, for a number of sequences of each split; one rank calls it."""
        length, top_k = facts.sequence_length, facts.top_k
        for split, count in sequences.items():
            for name, dtype, shape in (
                ("tokens", _id_type(facts), (count, length, top_k)),
                ("log_probs", np.float16, (count, length, top_k + 1)),
                ("losses", np.float32, (count,)),
            ):
                path = self._folder / f"{split}.{name}.npy"
                np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
        (self._folder / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")

    def write(self, split: Split, index_B: npt.NDArray[np.int64], top_k: int, found: TeacherTargets) -> None:
        """Write the predictions for the sequences of some indices, the first of those in `found`, which has all tokens.

        Raises:
            CheckpointError: a file cannot be written.
        """
        token_BSK = found.log_prob_BSK.topk(top_k, dim=-1).indices
        log_prob_BSK = with_rest(found.log_prob_BSK, token_BSK).clamp_min(torch.finfo(torch.float16).min)
        try:
            for name, values in zip(ARRAYS, (token_BSK, log_prob_BSK, found.loss_B), strict=True):
                file = np.load(self._folder / f"{split}.{name}.npy", mmap_mode="r+", allow_pickle=False)
                file[index_B] = values[: len(index_B)].cpu().numpy()
                file.flush()
        except OSError as error:
            raise CheckpointError(f"{self._folder} cannot be written: {error.strerror or error}") from error
