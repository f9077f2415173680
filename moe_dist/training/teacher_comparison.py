"""Comparison of a run with its teacher on validation text, before its first step and after its last."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import RunConfig
from moe_dist.data import Sequences, validation_batches
from moe_dist.distillation.teacher import Teacher
from moe_dist.distributed.init import RankInfo
from moe_dist.engine.callback import Callback
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.metrics.recorder import Recorder
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.teacher_loss import kl_divergence
from moe_dist.training.validation import mean_of_sources


class TeacherComparison(Callback):
    """Callback that measures the loss of the text and the divergence from the teacher; does nothing without one."""

    def __init__(
        self,
        teacher: Teacher | None,
        config: RunConfig,
        held_out: Mapping[str, Sequences],
        micro: int,
        process: RankInfo,
        to: Recorder,
    ) -> None:
        """Create the callback.

        Args:
            held_out: validation sequences by source.
            micro: sequences of a rank's micro-batch.
        """
        self._teacher, self._config, self._micro = teacher, config, micro
        self._held_out, self._process, self._recorder = held_out, process, to
        self._found: dict[str, dict[str, float]] = {}

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Compare this model from now on."""
        self._model = engine.model

    def release(self) -> None:
        """Forget the model."""
        del self._model

    def start(self, step: int) -> None:
        """Compare before the first step; collective."""
        if step == 0:
            self._compare("before", step)

    def finish(self, step: int) -> None:
        """Compare after the last step; collective."""
        self._compare("after", step)

    def state(self) -> Mapping[str, Any]:
        """Return the figures of the start, which a resumed run reports too."""
        return {} if self._teacher is None else {"teacher": self}

    def state_dict(self) -> dict[str, Any]:
        """Return the figures."""
        return {"found": self._found}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore the figures of an earlier process."""
        self._found = {when: dict(figures) for when, figures in state["found"].items()}

    def summary(self) -> dict[str, Any]:
        """Return the figures of both times, by name."""
        return {"teacher": dict(self._found)} if self._found else {}

    def _compare(self, when: str, step: int) -> None:
        if self._teacher is None:
            return
        found = compare(self._model, self._teacher, self._held_out, self._config, self._micro, self._process)
        self._found[when] = found
        self._recorder.event("teacher", step, **found)
        self._recorder.note(
            f"{when} training: validation loss {found['loss']:.4f}, of the teacher {found['teacher_loss']:.4f}, "
            f"divergence from it {found['divergence']:.4f}"
        )


def compare(
    model: LanguageModel,
    teacher: Teacher,
    held_out: Mapping[str, Sequences],
    config: RunConfig,
    micro: int,
    process: RankInfo,
) -> dict[str, float]:
    """Return `loss`, `teacher_loss` and `divergence` on the validation sequences, nats per target; collective.

    Those of a blend are means over its sources, by weight as the validation loss is.
    """
    with model.evaluating():
        total_K4 = torch.stack(
            [_sums(model, teacher, sequences, config, micro, process) for sequences in held_out.values()]
        )
    dist.all_reduce(total_K4)
    mean_K3 = total_K4[:, :3] / total_K4[:, 3:]
    names = ("loss", "teacher_loss", "divergence")
    return {name: mean_of_sources(config, mean_K.tolist()) for name, mean_K in zip(names, mean_K3.T, strict=True)}


def _sums(
    model: LanguageModel, teacher: Teacher, sequences: Sequences, config: RunConfig, micro: int, process: RankInfo
) -> Tensor:
    """Return this rank's sums of losses, the teacher's losses and divergences, and of targets, float64 [4]."""
    total, mesh = torch.zeros(4, dtype=torch.float64, device=process.device), model.context.mesh
    most, groups = config.train.eval_sequences, mesh.shape.sequence_groups
    for batch in validation_batches(sequences, most, mesh.in_attention.group, groups, micro):
        sequence_BS = batch.tokens.to(process.device)
        told = teacher.targets("validation", batch.indices, sequence_BS)
        logits_BSV, loss_BS = model.logits_and_losses(sequence_BS)
        target_BS = model.targets_of(sequence_BS)
        divergence_BS = kl_divergence(logits_BSV, told, config.distill.temperature) * target_BS
        sums = (loss_BS.double().sum(1), told.loss_B, divergence_BS.double().sum(1), target_BS.sum(1))
        weight_B = batch.weight.to(total)
        total += torch.stack([(each.double() * weight_B).sum() for each in sums])
    return total
