"""Teacher of a run: a frozen model on every rank, or its stored predictions.

Shapes: B sequences, S tokens.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.checkpoint.load_model import load_model
from moe_dist.checkpoint.trained_weights import TrainedWeights, find_weights
from moe_dist.config import MemoryConfig, RunConfig, WorldConfig
from moe_dist.data import PreparedData
from moe_dist.distillation.stored_logits import Split, StoredTeacher, is_stored
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.evaluation.trained_model import evaluation_config, tokenizer_of
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.teacher_loss import TeacherTargets

HUGGING_FACE = "config.json"


class Teacher(Protocol):
    """Source of a teacher's predictions."""

    def targets(self, split: Split, index_B: npt.NDArray[np.int64], sequence_BS: Tensor) -> TeacherTargets:
        """Return the predictions for sequences [B, S + 1] of the prepared text; all ranks call it together.

        Args:
            index_B: their indices in the token file.
        """


class LiveTeacher:
    """Frozen model that computes its predictions when they are needed; its experts are divided as the run's are.

    Attributes:
        step: last step of its training.
    """

    def __init__(self, model: LanguageModel, temperature: float, step: int) -> None:
        self._model, self._temperature, self.step = model, temperature, step

    def targets(self, split: Split, index_B: npt.NDArray[np.int64], sequence_BS: Tensor) -> TeacherTargets:
        """Return the predictions for sequences [B, S + 1]; collective."""
        with self._model.evaluating():
            logits_BSV, loss_BS = self._model.logits_and_losses(sequence_BS)
            log_prob_BSV = functional.log_softmax(logits_BSV.float() / self._temperature, dim=-1)
        return TeacherTargets(log_prob_BSV, None, loss_BS.double().sum(dim=1))


def open_teacher(config: RunConfig, process: RankInfo, mesh: Mesh, data: PreparedData) -> Teacher | None:
    """Return the teacher of a run, None if it has none; collective.

    Raises:
        CheckpointError: the teacher's weights or its stored predictions are missing or damaged.
        ConfigError: its vocabulary or tokenizer differs, its experts do not divide over the ranks, or its stored
            predictions are of other text.
    """
    if config.distill.teacher is None:
        return None
    folder = Path(config.distill.teacher)
    if is_stored(folder):
        require_whole_text(config, f"distill.teacher={folder}: stored predictions")
        return StoredTeacher.open(folder, config, data, process.device)
    return live_teacher(config, process, mesh, data)


def live_teacher(config: RunConfig, process: RankInfo, mesh: Mesh, data: PreparedData) -> LiveTeacher:
    """Load the model in `distill.teacher`; collective.

    Raises:
        CheckpointError: it holds no weights.
        ConfigError: it does not fit the run.
    """
    folder = Path(config.distill.teacher or "")
    if (folder / HUGGING_FACE).is_file():
        raise ConfigError(
            f"distill.teacher={folder} is a Hugging Face folder: give the run that `moe-dist import {folder} -o RUN` "
            "makes of it"
        )
    weights = find_weights(folder)
    if weights.stored:
        raise ConfigError(f"distill.teacher={folder} is an exported file with quantized experts: give its run")
    _require_same_tokens(folder, weights, data)
    whole = config.world.model_copy(update={"context": 1})  # `mesh` divides its sequences
    own = evaluation_config(weights.config, whole, config.train.precision, MemoryConfig())
    _require_layout(folder, own, mesh)
    weights = TrainedWeights(weights.path, weights.manifest, own.model_copy(update={"corpus": config.corpus}))
    dtype = getattr(torch, config.train.precision)
    model = load_model(weights, mesh, Links.discover(process.device), process.device, dtype)
    model.requires_grad_(False)
    model.end_of_document = data.end_of_document
    return LiveTeacher(model, config.distill.temperature, weights.manifest.step)


def require_whole_text(config: RunConfig, what: str) -> None:
    """Reject settings that do not work with stored predictions.

    Raises:
        ConfigError: the text is a blend, or ranks hold parts of sequences.
    """
    for key, value, refused, remedy in (
        ("corpus.kind", config.corpus.kind, config.corpus.kind == "blend", "give one source"),
        ("world.context", config.world.context, config.world.context > 1, "set it to 1"),
    ):
        if refused:
            raise ConfigError(f"{what} do not work with {key}={value}: {remedy}, or train with the teacher's run")


def _require_same_tokens(folder: Path, weights: TrainedWeights, data: PreparedData) -> None:
    rows = weights.manifest.data.vocab_size
    if rows != data.vocab_size:
        raise ConfigError(
            f"distill.teacher={folder} has a vocabulary of {rows} tokens, but this run's has {data.vocab_size}: both "
            "must be the same"
        )
    theirs = tokenizer_of(folder, weights).path
    if theirs.read_bytes() != data.tokenizer_path.read_bytes():
        raise ConfigError(
            f"distill.teacher={folder} has another tokenizer than this run ({theirs} is not {data.tokenizer_path}): "
            "set tokenizer.kind and tokenizer.path to the teacher's"
        )


def _require_layout(folder: Path, teacher: RunConfig, mesh: Mesh) -> None:
    shape = mesh.shape
    mode = "slice" if shape.sliced else "experts"
    layout = WorldConfig(cluster=shape.cluster, shard=shape.shard, shard_mode=mode)
    try:
        teacher.moe.layer_kind.check_layout(layout, teacher.moe)
    except ConfigError as error:
        raise ConfigError(f"distill.teacher={folder}: {error}: change world.cluster or world.shard") from error
