"""Training loop: forward and backward passes, update, evaluation; everything else is a callback."""

import errno
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.stateful import Stateful
from moe_dist.config import RunConfig, WorldShape, resolve_batch, resolve_world, tokens_on_rank
from moe_dist.console import tolerant_output
from moe_dist.data import PrefetchingLoader, PreparedData, open_batches, open_sequences, open_tokenizer, prepare_data
from moe_dist.dispatch.layout_advice import layout_advice
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distillation.teacher import open_teacher
from moe_dist.distributed.agreement import differing_ranks
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.engine.callback import Callback, StepReport
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome
from moe_dist.engine.loss_scale import LossScale
from moe_dist.errors import DataError, TrainingError, file_error
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.metrics.recorder import Recorder
from moe_dist.metrics.wall_clock import WallClock
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.teacher_loss import TeacherTargets
from moe_dist.moe.training_step import train_residuals_only
from moe_dist.recluster.coordinator import Coordinator
from moe_dist.training.backend_choice import BackendChoice
from moe_dist.training.banner import banner, continuing_command, device_warning
from moe_dist.training.checkpointing import RunCheckpoints
from moe_dist.training.finished_run import show_if_finished
from moe_dist.training.hang_guard import end_process
from moe_dist.training.initial_weights import find_initial_weights
from moe_dist.training.learning_rate import learning_rate
from moe_dist.training.metrics_logger import MetricsLogger
from moe_dist.training.overlap_choice import OverlapChoice
from moe_dist.training.precision_advice import check_same_precision, precision_advice
from moe_dist.training.preemption import StopSignals
from moe_dist.training.resume import Resumption, data_record, find_resumption, open_recorder
from moe_dist.training.summary import run_summary
from moe_dist.training.summary_metrics import traffic_matrices
from moe_dist.training.teacher_comparison import TeacherComparison
from moe_dist.training.validation import ValidationLoss, validation_loss
from moe_dist.training.warmup import StandardWarmup
from moe_dist.training.watchdog import Watchdog, watched_seconds

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of a file store, which torch raises as its own."""


def train(config: RunConfig, give_up: Callable[[Exception], None] = end_process) -> bool:
    """Train the configured model; every rank of the job calls this.

    Args:
        give_up: ends this process with an error while its main thread hangs.

    Returns:
        True if the run stopped before its last step, with a checkpoint, because of a signal (`preemption.py`).

    Raises:
        MoeDistError: data, launch or training failed with an error that the user can fix.
    """
    with tolerant_output():
        try:
            return _train(config, give_up)
        except OSError as error:
            folders = f"runs_dir={config.runs_dir} or corpus.cache_dir={config.corpus.cache_dir}"
            raise (file_error(error, folders) or error) from error
        except dist.DistStoreError as error:
            reason = str(error).strip().splitlines()[0]
            if not any(os.strerror(number) in reason for number in FULL):
                raise  # another rank has ended
            raise TrainingError(
                f"the file through which the ranks meet cannot be written: {reason}: free space in "
                f"{tempfile.gettempdir()}, then resume"
            ) from error


def _train(config: RunConfig, give_up: Callable[[Exception], None]) -> bool:
    process = init_distributed(config.world)
    clock = WallClock()
    shape = resolve_world(config, process.ranks)
    if show_if_finished(config, process.rank):
        shutdown()
        return False
    if process.rank == 0:
        print(f"{config.name}: reading text and tokenizer (corpus.kind={config.corpus.kind})", flush=True)
    check_same_precision(config, process)
    data = prepare_data(config.corpus, config.tokenizer)
    _require_same_data(data, process)
    resumption = find_resumption(config, data)
    recorder = open_recorder(config, process.rank, resumption)
    with recorder, StopSignals() as signals:
        if process.rank == 0:
            for name, content in open_tokenizer(data.tokenizer_path).files().items():
                recorder.keep(name, content)  # an evaluation may not have the text
        steps_done = 0 if resumption is None else resumption.step
        trainer = Trainer(config, process, shape, data, recorder, steps_done, clock)

        def hangs(error: TrainingError) -> None:
            recorder.event("failed", trainer.steps_done, error=str(error))
            give_up(error)

        def paused(seconds: float) -> None:
            recorder.note(f"the process did not run for {seconds:.0f} s (suspended): training continues")
            recorder.event("paused", trainer.steps_done, seconds=seconds)

        run = trainer.checkpoints.run
        events = run / "events.jsonl" if process.rank == 0 else None
        watchdog = Watchdog(watched_seconds(config), run, process.rank, hangs, give_up, events, paused)
        with trainer:
            trainer.callbacks.insert(0, watchdog)
            stopped = trainer.run(signals, resumption)
    shutdown()
    return stopped


class Trainer:
    """Training loop over the batches of a run, and the callbacks that accompany it."""

    def __init__(
        self,
        config: RunConfig,
        process: RankInfo,
        shape: WorldShape,
        data: PreparedData,
        recorder: Recorder,
        steps_done: int = 0,
        clock: WallClock | None = None,
    ) -> None:
        self._clock = clock or WallClock()
        self.config, self.process, self.shape, self.data, self.recorder = config, process, shape, data, recorder
        self.batch, self.steps_done = resolve_batch(config, process.ranks), steps_done
        self.mesh = Mesh.create(shape, process.timeout)
        self.ledger = TrafficLedger(Links.discover(process.device))
        self.loss_scale = LossScale(config.train.precision == "float16")
        batches = open_batches(config, data, self.mesh.in_attention.group, shape.sequence_groups)
        self.loader = PrefetchingLoader(batches)
        self._sources = len(data.sources) if config.corpus.kind == "blend" else 0
        self.held_out = open_sequences(config, data, "validation")
        self.teacher = open_teacher(config, process, self.mesh, data)
        self.build(config.phase_after(steps_done))
        self.callbacks = self._default_callbacks()
        self._attach_all()

    def build(self, config: RunConfig) -> None:
        """Create model and engine; those of before must have been released. Collective."""
        self.memory: ExpertMemory | None = None
        try:
            with raise_on_all_ranks():  # a directory or disk may fail on a single rank
                self.memory = self._expert_memory(config)
            with raise_on_all_ranks():
                self.model = LanguageModel(
                    config,
                    self.data.vocab_size,
                    self.mesh,
                    self.ledger.links,
                    self.batch.accumulation,
                    self.ledger,
                    self.memory,
                )
            self.model.end_of_document = self.data.end_of_document
            if config.optimizer.trainable == "residuals":
                train_residuals_only(self.model)
            self.engine = DeepSpeedEngine(self.model, config, self.batch, self.process, self.loss_scale)
        except BaseException:
            self._close_memory()
            raise

    def _expert_memory(self, config: RunConfig) -> ExpertMemory | None:
        if not config.memory.offload:
            return None
        moe, parallel = config.moe, self.mesh.group(GroupKind.EXPERT_PARALLEL).size
        per_layer = moe.clusters // self.shape.cluster if moe.layer_kind.clustered else moe.experts // parallel
        return ExpertMemory(config, per_layer, self.process.rank, self.process.device)

    def _default_callbacks(self) -> list[Callback]:
        """Return the callbacks of a run, in the order in which their hooks are called."""
        config, process = self.config, self.process
        tokens = tokens_on_rank(config, self.shape, self.batch)
        self.logger = MetricsLogger(config, self.shape, process, self.recorder, self._clock)
        self.checkpoints = RunCheckpoints(config, process, data_record(self.data), self.state, self.recorder)
        return [
            self.logger,
            Coordinator(config, self.recorder),
            BackendChoice(config, self.shape, process, tokens, self.recorder),
            OverlapChoice(config, self.shape, self.ledger.links, process.device, tokens, self.recorder),
            StandardWarmup(self),
            TeacherComparison(self.teacher, config, self.held_out, self.batch.micro, process, self.recorder),
            self.checkpoints,
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the memory tiers and the loader."""
        self.loader.close()
        self._close_memory()

    def _close_memory(self) -> None:
        if self.memory is not None:
            self.memory.close()

    def state(self) -> dict[str, Stateful]:
        """Return the parts of a checkpoint besides the model and its optimizer, by name."""
        parts: dict[str, Stateful] = {"traffic": self.ledger}
        if self.model.context.statistics is not None:
            parts["statistics"] = self.model.context.statistics
        if self.loss_scale.enabled:
            parts["loss_scale"] = self.loss_scale
        for callback in self.callbacks:
            parts |= callback.state()
        return parts

    def release_model(self) -> None:
        """Drop all references to model and engine, so that they can be freed and replaced."""
        for callback in self.callbacks:
            callback.release()
        self.engine.close()
        del self.engine, self.model
        self._close_memory()  # the memory of the next model uses the same folder
        self.memory = None

    def replace_model(self, config: RunConfig, fill: Callable[[], None], step: int) -> None:
        """Create another model and engine after `release_model`, and attach all callbacks to them; collective.

        Args:
            fill: writes the new model's state.
            step: last step done.
        """
        self.build(config)
        fill()
        self._attach_all()
        self._start_all(step)

    def _attach_all(self) -> None:
        for callback in self.callbacks:
            callback.attach(self.engine)

    def _start_all(self, step: int) -> None:
        for callback in self.callbacks:
            callback.start(step)

    def start(self) -> None:
        """Prepare for the first step; collective."""
        if self.process.rank == 0:
            self.recorder.note(banner(self))
            advices = (
                device_warning(self),
                layout_advice(self.config, self.shape),
                precision_advice(self.config, self.process.device),
            )
            for advice in advices:
                if advice is not None:
                    self.recorder.note(f"warning: {advice}")
        self._start_all(self.steps_done)

    def run(self, signals: StopSignals, resumption: Resumption | None = None) -> bool:
        """Restore the state of a resumption, and train for the remaining steps.

        Returns:
            True if training stopped before the last step because a rank received a signal.
        """
        train = self.config.train
        with ExitStack() as entered:
            for callback in self.callbacks:
                entered.enter_context(callback)
            if resumption is not None:
                self.checkpoints.restore(resumption)
            elif self.config.checkpoint.init is not None:
                self._start_from(Path(self.config.checkpoint.init))
            self.start()
            for step in range(self.steps_done + 1, train.steps + 1):
                stop_asked, last = self.train_step(step, signals), step == train.steps
                if train.evaluates_after(step):
                    self.evaluate(step)
                for callback in self.callbacks:
                    callback.end_step(step)
                self.steps_done = step
                if stop_asked and not last:
                    self._stop(step)
                    return True
            self._finish()
        return False

    def _start_from(self, run: Path) -> None:
        weights = find_initial_weights(run, self.data)
        self.checkpoints.start_from(weights)
        self.recorder.note(f"starts from the weights of {weights.path}")
        self.recorder.event("initialized", 0, path=str(weights.path))

    def train_step(self, step: int, signals: StopSignals) -> bool:
        """Train one step; return True if any rank was asked to stop after it."""
        started = time.perf_counter()
        for callback in self.callbacks:
            callback.before_step(step)
        sequences_BS, source_B = self.loader.batch(step - 1)
        waited = time.perf_counter() - started
        self.model.target_share = self.loader.target_share(step - 1)
        wanted, teach = lambda: signals.wanted, self._teaching(step)
        outcome = self.engine.forward_backward(sequences_BS, wanted, source_B, self._sources, teach)
        _stop_if_broken(step, outcome)
        if outcome.stop:
            signals.reached()
        rate = learning_rate(step, self.config.train, self.config.optimizer.learning_rate)
        self.engine.routers_only = step <= self.config.distill.router_steps
        norm = self.engine.update(outcome, rate)
        if not self.loss_scale.skipped:
            _stop_if_norm_broken(step, norm)
        report = StepReport(
            step, outcome, rate, norm, sequences_BS, lambda: self.loader.batch(step).sequences_BS, waited
        )
        for callback in self.callbacks:
            callback.after_update(report)
        report.seconds = time.perf_counter() - started
        for callback in self.callbacks:
            callback.after_step(report)
        return outcome.stop

    def _teaching(self, step: int) -> Callable[[int, Tensor], TeacherTargets] | None:
        """Return the function to the teacher's predictions for a micro-batch of a step; None: there is no teacher."""
        if (teacher := self.teacher) is None:
            return None
        _, index_B = self.loader.indices(step - 1)
        return lambda first, x_BS: teacher.targets("train", index_B[first : first + len(x_BS)], x_BS)

    def evaluate(self, step: int) -> None:
        """Evaluate the validation loss; collective.

        Raises:
            TrainingError: the loss is not finite.
        """
        for callback in self.callbacks:
            callback.before_evaluation(step)
        loss = self.validation_loss()
        if not math.isfinite(loss.mean):
            raise TrainingError(f"step {step}: the validation loss is {loss.mean}: the weights are no longer finite")
        for callback in self.callbacks:
            callback.after_evaluation(step, loss.mean, loss.by_source)

    def validation_loss(self) -> ValidationLoss:
        """Return the current validation loss, nats per token; collective."""
        return validation_loss(self.model, self.held_out, self.config, self.batch.micro, self.process)

    def _stop(self, step: int) -> None:
        for callback in self.callbacks:
            callback.stop(step)
        self.recorder.note(
            f"asked to stop: stopped after step {step}, with a checkpoint; to continue:\n"
            f"  {continuing_command(self.checkpoints.run)}"
        )
        self.recorder.event("stopped", step)

    def _finish(self) -> None:
        steps, curve = self.config.train.steps, self.logger.history.curve
        if not curve or curve[-1]["step"] != steps:
            self.evaluate(steps)  # e.g. resumed from a longer run
        for callback in self.callbacks:
            callback.finish(steps)
        self.recorder.traffic(traffic_matrices(self.ledger, self.process))
        self.recorder.finish(run_summary(self))


def _require_same_data(data: PreparedData, process: RankInfo) -> None:
    """Compare the prepared tokens of all ranks, since nodes without a shared file system prepare their own.

    Raises:
        DataError: the tokens differ.
    """
    digest = hashlib.sha256(f"{data.checksum('train')} {data.checksum('validation')}".encode()).digest()
    if different := differing_ranks(int.from_bytes(digest[:7], "big"), process.device):
        raise DataError(
            f"rank {', '.join(map(str, different))} prepared other tokens than rank 0: give all nodes the same text, "
            "or a shared corpus.cache_dir"
        )


def _stop_if_broken(step: int, outcome: StepOutcome) -> None:
    if outcome.broken_ranks:
        ranks = ", ".join(map(str, outcome.broken_ranks))
        raise TrainingError(
            f"step {step}: the loss of rank {ranks} is NaN or infinite; all ranks stop before the update. "
            "Lower optimizer.learning_rate, or look at the data of that step"
        )


def _stop_if_norm_broken(step: int, norm: float) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step}: the global gradient norm is {norm}, though the losses were finite; all ranks stop. Lower "
            "optimizer.learning_rate, or train in float32"
        )
