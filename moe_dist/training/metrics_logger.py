"""Metrics of a run: steps, loads and evaluations for the recorder, and their part of the summary."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_dist.config import RunConfig, WorldShape
from moe_dist.distributed.init import RankInfo
from moe_dist.engine.callback import Callback, StepReport
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.metrics.recorder import Recorder, perplexity
from moe_dist.metrics.wall_clock import WallClock
from moe_dist.training.flops_share import flops_share
from moe_dist.training.load_metrics import LoadRecord, last_fifth
from moe_dist.training.offload_metrics import offload_figures, updates_behind
from moe_dist.training.run_history import RunHistory
from moe_dist.training.source_metrics import SourceLosses
from moe_dist.training.summary_metrics import memory_now


class MetricsLogger(Callback):
    """Callback that keeps the run's history and passes figures to the recorder."""

    def __init__(
        self, config: RunConfig, shape: WorldShape, process: RankInfo, recorder: Recorder, clock: WallClock
    ) -> None:
        self._config, self._shape, self._process, self._recorder = config, shape, process, recorder
        self.history, self._clock, self.waited = RunHistory(), clock, 0.0
        self._idle: list[float] = []
        self._sources = SourceLosses(tuple(config.corpus.sources))
        self.tokens_per_step = config.train.global_batch_size * config.model.sequence_length

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Count loads by this model's placements from now on."""
        self._engine = engine
        self._flops_share = flops_share(engine.model.config, engine.model.vocab_size, self._process.device)
        moe, layers = engine.model.config.moe, self._config.moe_layers
        copies = moe.layer_kind.copies(moe)
        self._loads = LoadRecord(moe.experts, self._shape, self.tokens_per_step * layers * copies)
        self._routed, self._placements = moe.layer_kind.routed, engine.model.context.placements

    def release(self) -> None:
        """Clear the load statistics of standard experts, which have no clusters and therefore other keys."""
        del self._engine
        self.history.loads.clear()

    def start(self, step: int) -> None:
        """Note that data and model are ready."""
        self._clock.phase_ends("prepare")

    def finish(self, step: int) -> None:
        """Note that the last step is done."""
        self._clock.phase_ends("train")

    def after_update(self, report: StepReport) -> None:
        """Record the loads with the placement by which they were routed."""
        self._clock.first_step_ends()
        self.waited += report.waited
        self._idle.append(report.outcome.idle)
        if report.outcome.total_2K is not None:
            self._sources.add(report.outcome.total_2K)
        if self._routed:
            outcome = report.outcome
            self.history.loads.append(self._loads.add(outcome.count_LE.numpy(), outcome.dropped, self._placements))

    def after_step(self, report: StepReport) -> None:
        """Record the step's time, and log the step if it is due."""
        self.history.step_seconds.append(report.seconds)
        train = self._config.train
        if report.step % train.log_every == 0 or report.step in (1, train.steps):
            self._recorder.step(report.step, self._figures(report))
            self.record_loads(report.step)

    def record_loads(self, step: int) -> None:
        """Record the copies routed since the last time, if there are any steps to report; collective."""
        if self._loads.steps:
            counts = {**self._loads.take_counts(), "load": self.history.loads[-1]}
            if (behind_LG := updates_behind(self._engine, self._process)) is not None:
                counts["behind"] = behind_LG
            self._recorder.load(step, counts)

    def after_evaluation(self, step: int, loss: float, by_source: Mapping[str, float]) -> None:
        """Record the loss."""
        tokens, sources = step * self.tokens_per_step, {"sources": dict(by_source)} if by_source else {}
        self.history.curve.append({"step": step, "tokens": tokens, "loss": loss, **sources})
        self._recorder.evaluation(step, tokens, loss, **sources)

    def state(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def summary(self) -> dict[str, Any]:
        """Return losses, speed and loads of the whole run."""
        steps, history = self._config.train.steps, self.history
        loss = history.curve[-1]["loss"]
        timed = history.step_seconds[1:] or history.step_seconds  # the first step warms up
        return {
            "steps": steps,
            "tokens": steps * self.tokens_per_step,
            "seconds": sum(history.step_seconds),
            "first_step_seconds": self._clock.first_step,
            "wall_seconds": self._clock.seconds(),
            "validation": {"loss": loss, "perplexity": perplexity(loss), "curve": history.curve},
            **self._speed(self.tokens_per_step * len(timed) / sum(timed)),
            "load": last_fifth(history.loads),
            "pipeline": {"idle": float(np.mean(self._idle)) if self._idle and self._shape.pipeline > 1 else None},
        }

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        """Return the speed of all devices and of each, and the share of their peak where that is known."""
        each = tokens_per_second / self._process.ranks
        figures = {"tokens_per_second": tokens_per_second, "tokens_per_second_per_device": each}
        if self._flops_share is not None:
            figures["model_flops_utilization"] = each * self._flops_share
        return figures

    def _figures(self, report: StepReport) -> dict[str, Any]:
        recent, moe = self.history.step_seconds[-self._config.train.log_every :], self._config.moe
        train = {
            "loss": report.outcome.loss,
            **({"sources": losses} if (losses := self._sources.take()) else {}),
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
        }
        if (scaling := self._engine.loss_scale.figures()) is not None:
            train |= {"loss_scale": scaling["scale"], "skipped_steps": scaling["skipped_steps"]}
        if report.outcome.teacher_divergence is not None:
            train["teacher_divergence"] = report.outcome.teacher_divergence
        if moe.balance == "aux_loss":
            train["balance_loss"] = report.outcome.balance_loss
        if self._shape.pipeline > 1:
            train["pipeline_idle"] = report.outcome.idle
        if moe.z_loss_weight:
            train["z_loss"] = report.outcome.z_loss
        figures: dict[str, Any] = {
            "tokens": report.step * self.tokens_per_step,
            **self._speed(self.tokens_per_step / float(np.mean(recent))),
            "train": train,
            "data_wait_seconds": report.waited,
            "memory": memory_now(self._process),
        }
        if (offload := offload_figures(self._engine, self._process)) is not None:
            figures["offload"] = offload
        if self.history.loads:
            figures["load"] = self.history.loads[-1]
        return figures
