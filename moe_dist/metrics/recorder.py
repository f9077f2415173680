"""Recorder of a run on rank 0; other ranks have one that does nothing."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_dist.config import RunConfig, dump_config
from moe_dist.console import wide_console
from moe_dist.errors import MoeDistError
from moe_dist.metrics import Progress, RunFolder, render_summary
from moe_dist.metrics.at_work import words_at_work
from moe_dist.metrics.run_lock import RunLock
from moe_dist.metrics.run_picture import write_picture
from moe_dist.metrics.trackers import Trackers


class Recorder:
    """Recorder that does nothing, for every rank but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def folder(self) -> Path | None:
        """The run's folder; None on a rank that does not write it."""
        return None

    def keep(self, name: str, content: bytes) -> None:
        """Write a file that belongs to the run."""

    def note(self, message: str) -> None:
        """Print a line above the progress display."""

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Record an event, in `events.jsonl`."""

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Record the figures of a logged step."""

    def load(self, step: int, values: dict[str, Any]) -> None:
        """Record the copies routed since the last logged step."""

    def traffic(self, values: dict[str, Any]) -> None:
        """Record the traffic matrices of the whole run."""

    def evaluation(self, step: int, tokens: int, loss: float, sources: Mapping[str, float] | None = None) -> None:
        """Record a validation loss, and those of a blend's sources."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Record the summary of a complete run."""


class NullRecorder(Recorder):
    """Recorder of a benchmark's run: has a folder, on rank 0, and writes nothing there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @property
    def folder(self) -> Path | None:
        """The folder that it was given."""
        return self._path


class RunRecorder(Recorder):
    """Recorder that writes the run folder and shows progress and summary.

    Args:
        run: folder of a run that resumes after `step`; None: the run gets a new one.
        lock: lock of that folder, if the caller has acquired it.
    """

    def __init__(self, config: RunConfig, run: Path | None = None, step: int = 0, lock: RunLock | None = None) -> None:
        self._console = wide_console()
        self._progress = Progress(config.train.steps, self._console)
        options: dict[str, Any] = {
            "tensorboard": config.tensorboard,
            "summary_copy": config.summary_copy,
            "warn": self._progress.note,
        }
        if run is None:
            self._folder = RunFolder.create(config.runs_dir, config.name, dump_config(config), **options)
        else:
            self._folder = RunFolder.reopen(run, step, dump_config(config), lock=lock, **options)
        self._picture, self._train = config.picture, config.train
        self._at_work: dict[str, str] = {}
        self._trackers = Trackers(config, self._folder.path, self._progress.note)

    def __enter__(self) -> Self:
        self._folder.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._progress.__exit__(kind, error, trace)
            self._trackers.finish(None)
        finally:
            self._folder.__exit__(kind, error, trace)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._folder.path

    def keep(self, name: str, content: bytes) -> None:
        """Write a file into the folder, and write it again if the folder is removed."""
        self._folder.keep(name, content)

    def note(self, message: str) -> None:
        """Print a line above the progress display."""
        self._progress.note(message)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Append a line to `events.jsonl`; a re-clustering is also shown beside the figures."""
        if name == "recluster" and fields.get("moved_experts"):
            self._at_work["regrouped"] = f"at step {step}"
        self._folder.event(name, step, **fields)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and update TensorBoard and the progress display."""
        self._folder.log(step, values)
        self._trackers.log(step, values)
        self._progress.update(
            step,
            loss=values["train"]["loss"],
            tokens_per_second=values["tokens_per_second"],
            load_cv2=values["load"]["cv2"] if "load" in values else None,
            at_work=self._at_work | dict(words_at_work(values)),
            evaluation_follows=self._train.evaluates_after(step),
        )

    def load(self, step: int, values: dict[str, Any]) -> None:
        """Append a line to `load.jsonl`."""
        self._folder.load(step, values)

    def traffic(self, values: dict[str, Any]) -> None:
        """Write the traffic matrices; training is complete without them."""
        try:
            self._folder.write_traffic(values)
        except MoeDistError as error:
            self.note(f"warning: {error}")

    def evaluation(self, step: int, tokens: int, loss: float, sources: Mapping[str, float] | None = None) -> None:
        """Append a line to `events.jsonl` and one to `metrics.jsonl`; losses in nats per token."""
        figures = {"loss": loss, "perplexity": perplexity(loss), **({"sources": dict(sources)} if sources else {})}
        self._folder.event("evaluation", step, tokens=tokens, **figures)
        self._folder.log(step, {"tokens": tokens, "validation": figures})
        self._trackers.log(step, {"tokens": tokens, "validation": figures})
        self._progress.update(step, validation_loss=loss)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and show it in place of the progress display."""
        self._progress.__exit__(None, None, None)
        picture = write_picture(self._folder.path, summary) if self._picture else None
        render_summary(summary, self._console, self._folder.path, picture)
        self._folder.write_summary(summary)
        self._trackers.finish(summary)
        self._folder.event("finished", summary["steps"])


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity on overflow."""
    return math.exp(loss) if loss < 700 else math.inf
