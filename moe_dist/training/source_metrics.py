"""Metrics of the training data: losses and draws of a blend's sources, padding, and the time that steps wait."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.data.packing import PackedSequences

if TYPE_CHECKING:
    from moe_dist.training.trainer import Trainer


class SourceLosses:
    """Training losses of a blend's sources since the last logged step."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._total_2K = torch.zeros(2, len(names), dtype=torch.float64)

    def add(self, total_2K: Tensor) -> None:
        """Add the sums of losses and targets of a step."""
        self._total_2K += total_2K

    def take(self) -> dict[str, float]:
        """Return the mean loss of each source that was drawn, nats per target, and start anew."""
        losses = {
            name: loss / targets
            for name, loss, targets in zip(self._names, *self._total_2K.tolist(), strict=True)
            if targets
        }
        self._total_2K.zero_()
        return losses


def data_summary(trainer: "Trainer") -> dict[str, Any]:
    """Return the figures of `data` in `summary.json`."""
    waited, seconds = trainer.logger.waited, sum(trainer.logger.history.step_seconds)
    return {
        "wait_seconds": waited,
        "wait_share": waited / seconds if seconds else None,
        "packing": trainer.config.corpus.packing,
        "sources": {name or "corpus": figures for name, figures in _sources(trainer).items()},
    }


def _sources(trainer: "Trainer") -> Mapping[str, dict[str, Any]]:
    config, curve = trainer.config, trainer.logger.history.curve
    drawn_K = trainer.loader.plan.drawn(config.train.steps * config.train.global_batch_size)
    losses = curve[-1].get("sources", {}) if curve else {}
    figures = {}
    for (name, sequences), drawn in zip(trainer.loader.sources.items(), drawn_K, strict=True):
        figures[name] = {
            "sequences": drawn,
            "tokens": drawn * config.model.sequence_length,
            "epochs": drawn / len(sequences),
            "validation_loss": losses.get(name),
        }
        if isinstance(sequences, PackedSequences):
            facts = sequences.facts
            figures[name] |= {"padding": facts.padding, "cut_documents": facts.cut_documents / facts.documents}
    return figures
