"""When a run saves, and what it says about it."""

from pathlib import Path
from types import TracebackType
from typing import Self

from moe_dist.checkpoint.find import agreed
from moe_dist.checkpoint.manifest import DataRecord
from moe_dist.checkpoint.random_state import RandomState
from moe_dist.checkpoint.run_state import RunState
from moe_dist.checkpoint.saver import CheckpointSaver, Saved
from moe_dist.checkpoint.stateful import Parts
from moe_dist.checkpoint.store import FINAL, step_folder
from moe_dist.config import RunConfig
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.errors import CheckpointError, MoeDistError
from moe_dist.metrics.recorder import Recorder
from moe_dist.training.resume import Resumption


class RunCheckpoints:
    """Takes the checkpoints that `checkpoint.*` asks for; all ranks call it at the same points."""

    def __init__(
        self, config: RunConfig, engine: DeepSpeedEngine, data: DataRecord, parts: Parts, recorder: Recorder
    ) -> None:
        """Args: parts: what outlives a step besides the model, its optimizer, its balance and the random generators."""
        self._options, self._recorder = config.checkpoint, recorder
        run = agreed(recorder.folder and recorder.folder.absolute())
        assert run is not None, "rank 0 has a folder"
        self._run = run
        self._saver = CheckpointSaver(run, config.checkpoint, engine.process)
        self._data = data
        self.follow(engine, parts)
        self._last: int | None = None

    def follow(self, engine: DeepSpeedEngine, parts: Parts) -> None:
        """Saves the state of this model and of these parts from now on."""
        own: Parts = {"balance": engine.model.context.balance, "random": RandomState()}
        self._state = RunState(engine, self._data, {**own, **parts})

    def let_go(self) -> None:
        """Holds on to no model until it is told which one to follow."""
        del self._state

    @property
    def run(self) -> Path:
        """The run's folder, known to all ranks."""
        return self._run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is being written is finished where all ranks still live: they know of their user's errors together."""
        if error is None or isinstance(error, MoeDistError):
            self.settle()

    def restore(self, resumption: Resumption) -> None:
        """Puts the run into the state of a checkpoint; collective."""
        self._state.restore(resumption.found)
        self._last = resumption.step if resumption.run is not None else None

    def after_step(self, step: int) -> None:
        """Saves where it is time to, and tells how an earlier save ended."""
        self._tell(self._saver.poll())
        if self._options.every and step % self._options.every == 0:
            self._start(step)

    def stop(self, step: int) -> None:
        """Saves the state after `step`, unless that is done, and waits until it is on the disk.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        if self._last != step:
            self._start(step)
        self._finish_writing()

    def finish(self, step: int) -> None:
        """Waits for what is being written, and keeps the trained weights where `checkpoint.save_final` asks for it.

        Raises:
            CheckpointError: they could not be written.
        """
        self.settle()
        if self._options.save_final:
            self._saver.save(self._run / FINAL, *self._state.weights(step))
            self._finish_writing()

    def settle(self) -> None:
        """Waits for what is being written."""
        self._tell(self._saver.wait())

    def _start(self, step: int) -> None:
        self._tell(self._saver.save(step_folder(self._run, step), *self._state.checkpoint(step)))
        self._last = step

    def _finish_writing(self) -> None:
        saved = self._saver.wait()
        self._tell(saved)
        if saved is not None and saved.error is not None:
            raise CheckpointError(saved.error)

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.error is not None:
            self._recorder.note(f"warning: {saved.error}")
            self._recorder.event("checkpoint_failed", saved.step, error=saved.error)
            return
        times = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds}
        self._recorder.event("checkpoint", saved.step, path=str(saved.path.relative_to(self._run)), **times)
