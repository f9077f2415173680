"""Checkpoints during a run, as a callback of the training loop."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from moe_dist.checkpoint.async_saver import CheckpointSaver, Saved
from moe_dist.checkpoint.find import agreed
from moe_dist.checkpoint.manifest import DataRecord
from moe_dist.checkpoint.random_state import RandomState
from moe_dist.checkpoint.run_state import RunState
from moe_dist.checkpoint.stateful import Parts
from moe_dist.checkpoint.store import FINAL, step_folder
from moe_dist.checkpoint.trained_weights import TrainedWeights
from moe_dist.config import RunConfig
from moe_dist.distributed.init import RankInfo
from moe_dist.engine.callback import Callback
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.errors import CheckpointError, MoeDistError
from moe_dist.metrics.recorder import Recorder
from moe_dist.training.resume import Resumption


class RunCheckpoints(Callback):
    """Callback that saves checkpoints as configured in `checkpoint.*`."""

    def __init__(
        self,
        config: RunConfig,
        process: RankInfo,
        data: DataRecord,
        parts: Callable[[], Parts],
        recorder: Recorder,
    ) -> None:
        """Agree on the folder of the run, which only rank 0 has opened; collective.

        Args:
            parts: returns the objects to save besides model, optimizer, load balance and random generators.
        """
        self._options, self._recorder = config.checkpoint, recorder
        run = agreed(recorder.folder and recorder.folder.absolute())
        assert run is not None, "rank 0 has a folder"
        self._run = run
        self._saver = CheckpointSaver(run, config.checkpoint, process)
        self._data, self._parts = data, parts
        self._last: int | None = None

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Save the state of this engine, its model and the run's parts from now on."""
        own: Parts = {"balance": engine.model.context.balance, "random": RandomState()}
        self._state = RunState(engine, self._data, {**own, **self._parts()})

    def release(self) -> None:
        """Drop the reference to the model."""
        del self._state

    @property
    def run(self) -> Path:
        """Folder of the run, the same on all ranks."""
        return self._run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the running save, unless this rank alone failed: its peers would then never finish."""
        if error is None or isinstance(error, MoeDistError):
            self.settle()

    def restore(self, resumption: Resumption) -> None:
        """Restore the state of a checkpoint; collective."""
        self._state.restore(resumption.found)
        self._last = resumption.step if resumption.run is not None else None

    def start_from(self, weights: TrainedWeights) -> None:
        """Set the weights of a new run; collective."""
        self._state.start_from(weights.path, weights.manifest)

    def end_step(self, step: int) -> None:
        """Save if a checkpoint is due, and report the result of an earlier one."""
        self._report(self._saver.poll())
        if self._options.every and step % self._options.every == 0:
            self._start(step)

    def stop(self, step: int) -> None:
        """Save the state after `step`, unless it has been saved, and wait until it is on disk.

        Raises:
            CheckpointError: the checkpoint could not be written; earlier checkpoints are not affected.
        """
        if self._last != step:
            self._start(step)
        self._finish_writing()

    def finish(self, step: int) -> None:
        """Wait for the running save, and save the trained weights if `checkpoint.save_final` is set.

        Raises:
            CheckpointError: the weights could not be written.
        """
        self.settle()
        if self._options.save_final:
            self._saver.save(self._run / FINAL, *self._state.weights(step))
            self._finish_writing()

    def settle(self) -> None:
        """Wait for the running save and report its result."""
        self._report(self._saver.wait())

    def _start(self, step: int) -> None:
        self._report(self._saver.save(step_folder(self._run, step), *self._state.checkpoint(step)))
        self._last = step

    def _finish_writing(self) -> None:
        saved = self._saver.wait()
        self._report(saved)
        if saved is not None and saved.error is not None:
            raise CheckpointError(saved.error)

    def _report(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.error is not None:
            self._recorder.note(f"warning: {saved.error}")
            self._recorder.event("checkpoint_failed", saved.step, error=saved.error)
            return
        if saved.warning is not None:
            self._recorder.note(f"warning: {saved.warning}")
        times = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds}
        self._recorder.event("checkpoint", saved.step, path=str(saved.path.relative_to(self._run)), **times)
