"""Fine-tuning of a trained model on one GLUE task, and its predictions; on any number of ranks.

Shapes: B sentences of a batch over all ranks, b of this rank, C outputs, V rows of a validation split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import BatchShape, RunConfig
from moe_dist.distributed.init import RankInfo
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.errors import TrainingError
from moe_dist.evaluation.sentence_model import Encoded, SentenceModel, pack
from moe_dist.evaluation.trained_model import quantized_as_stored

WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class FineTuning:
    """Hyperparameters of a fine-tuning.

    Attributes:
        batch: sentences per step, over all ranks.
        learning_rate: peak learning rate; None: a quarter of the run's own.
        max_steps: upper limit of steps, whatever `epochs` is.
    """

    epochs: float = 3.0
    batch: int = 32
    learning_rate: float | None = None
    max_steps: int | None = None

    def steps(self, rows: int) -> int:
        """Return the number of steps for `rows` training rows."""
        steps = max(1, round(self.epochs * rows / self.batch))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rate(self, step: int, steps: int, highest: float) -> float:
        """Return the learning rate of a step: linear warm-up over a tenth of the steps, then linear decay to 0."""
        warmup = max(1, round(WARMUP_SHARE * steps))
        return highest * min(step / warmup, (steps - step + 1) / max(1, steps - warmup + 1))


def fine_tune(
    model: SentenceModel, rows: Sequence[Encoded], how: FineTuning, config: RunConfig, seed: int, process: RankInfo
) -> DeepSpeedEngine:
    """Train all weights and return the engine that holds the model; collective.

    Args:
        config: configuration of the evaluation; `how` replaces its learning rate.

    Raises:
        TrainingError: the loss is not finite.
    """
    engine = DeepSpeedEngine(model, config, BatchShape(how.batch // process.ranks, 1), process)
    highest = how.learning_rate or config.optimizer.learning_rate / 4
    steps = how.steps(len(rows))
    for step, batch in enumerate(_batches(rows, how.batch, steps, seed, process), 1):
        outcome = engine.forward_backward(batch)
        if outcome.broken_ranks:
            engine.close()
            raise TrainingError(f"the loss is not finite at step {step} of {steps}: lower --learning-rate {highest:g}")
        engine.update(outcome, how.rate(step, steps, highest))
    return engine


def _batches(rows: Sequence[Encoded], batch: int, steps: int, seed: int, process: RankInfo) -> Iterator[Tensor]:
    """Yield this rank's part of each batch, padded to the batch's longest sentence; reshuffled each epoch."""
    random, order = np.random.RandomState(seed), np.empty(0, dtype=np.int64)
    share = batch // process.ranks
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, random.permutation(len(rows))])
        chosen, order = [rows[index] for index in order[:batch]], order[batch:]
        width = max(len(row.tokens) for row in chosen)
        yield pack(chosen[process.rank * share : (process.rank + 1) * share], width)


def predict(model: SentenceModel, rows: Sequence[Encoded], batch: int, process: RankInfo) -> npt.NDArray[np.float64]:
    """Return a class number or a similarity for every row, [V]; collective, the same on all ranks."""
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))  # less padding
    found = np.empty(len(rows))
    for start in range(0, len(rows), batch * process.ranks):
        indices = by_length[start : start + batch * process.ranks]
        own = [indices[(process.rank * batch + place) % len(indices)] for place in range(batch)]
        width = max(len(rows[index].tokens) for index in indices)
        with model.evaluating(), quantized_as_stored(model):
            out_bC = model.outputs(pack([rows[index] for index in own], width).to(process.device))
        values_b = (out_bC.argmax(dim=1) if model.classes else out_bC[:, 0]).double()
        gathered = [torch.empty_like(values_b) for _ in range(process.ranks)]
        dist.all_gather(gathered, values_b)
        found[indices] = torch.cat(gathered).cpu().numpy()[: len(indices)]
    return found
