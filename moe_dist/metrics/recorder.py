"""What rank 0 keeps and shows of a run; the other ranks get one that does nothing."""

import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_dist.config import RunConfig, dump_config
from moe_dist.console import wide_console
from moe_dist.metrics import Progress, RunFolder, render_summary


class Recorder:
    """Does nothing: the recorder of every rank but the first."""

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

    def note(self, message: str) -> None:
        """A line above the progress display, about something that has just happened."""

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Something that happened, for `events.jsonl`."""

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Figures of a logged step."""

    def load(self, step: int, values: dict[str, Any]) -> None:
        """Copies routed since the last logged step."""

    def traffic(self, values: dict[str, Any]) -> None:
        """Who sent how much to whom, over the whole run."""

    def evaluation(self, step: int, tokens: int, loss: float) -> None:
        """A validation loss."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete."""


class NullRecorder(Recorder):
    """Recorder of a model that is trained to be measured: has a folder, on rank 0, and writes nothing there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @property
    def folder(self) -> Path | None:
        """The folder it was given."""
        return self._path


class RunRecorder(Recorder):
    """Writes the run folder and shows progress and summary.

    Args:
        run: the folder of a run that goes on after `step`; None: the run gets a new one.
    """

    def __init__(self, config: RunConfig, run: Path | None = None, step: int = 0) -> None:
        options: dict[str, Any] = {"tensorboard": config.tensorboard, "summary_copy": config.summary_copy}
        if run is None:
            self._folder = RunFolder.create(config.runs_dir, config.name, dump_config(config), **options)
        else:
            self._folder = RunFolder.reopen(run, step, dump_config(config), **options)
        self._console = wide_console()
        self._progress = Progress(config.train.steps, self._console)

    def __enter__(self) -> Self:
        self._folder.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._progress.__exit__(kind, error, trace)
        finally:
            self._folder.__exit__(kind, error, trace)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._folder.path

    def note(self, message: str) -> None:
        """A line above the progress display."""
        self._progress.note(message)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """A line of `events.jsonl`."""
        self._folder.event(name, step, **fields)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`, TensorBoard and the progress display."""
        self._folder.log(step, values)
        self._progress.update(
            step,
            loss=values["train"]["loss"],
            tokens_per_second=values["tokens_per_second"],
            load_cv2=values["load"]["cv2"] if "load" in values else None,
        )

    def load(self, step: int, values: dict[str, Any]) -> None:
        """A line of `load.jsonl`."""
        self._folder.load(step, values)

    def traffic(self, values: dict[str, Any]) -> None:
        """Writes the traffic matrices."""
        self._folder.write_traffic(values)

    def evaluation(self, step: int, tokens: int, loss: float) -> None:
        """A line of `events.jsonl` and one of `metrics.jsonl`; loss in nats a token."""
        self._folder.event("evaluation", step, tokens=tokens, loss=loss, perplexity=perplexity(loss))
        self._folder.log(step, {"tokens": tokens, "validation": {"loss": loss, "perplexity": perplexity(loss)}})
        self._progress.update(step, validation_loss=loss)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary and shows it in place of the progress display."""
        self._folder.write_summary(summary)
        self._folder.event("finished", summary["steps"])
        self._progress.__exit__(None, None, None)
        render_summary(summary, self._console, self._folder.path)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
