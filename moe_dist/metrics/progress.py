"""Progress of a run: a live display on a terminal, otherwise a plain line at intervals."""

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

FIGURES = ("loss", "validation", "tokens/s", "balance cv²")


class Progress:
    """Progress display of rank 0.

    Args:
        total_steps: steps of the run.
        console: output; None: standard output.
        plain_every: seconds between lines if the console is not a terminal; an evaluation and the last step always
            print one.
        clock: monotonic time in seconds; tests pass their own.
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        *,
        plain_every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._plain_every = plain_every
        self._clock = clock
        self._step = 0
        self._first: tuple[int, float] | None = None
        self._last_line: float | None = None
        self._figures: dict[str, str | None] = dict.fromkeys(FIGURES)
        self._at_work: Mapping[str, str] = {}
        self._line_follows = False
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        validation_loss: float | None = None,
        tokens_per_second: float | None = None,
        load_cv2: float | None = None,
        at_work: Mapping[str, str] | None = None,
        evaluation_follows: bool = False,
    ) -> None:
        """Show the figures after `step` steps; a figure that is None keeps the value shown before.

        Plain lines show a validation loss at its own step only.

        Args:
            loss, validation_loss: nats per token.
            load_cv2: balance of the experts' loads, 0 is perfect (`metrics.load_balance`).
            at_work: words of features by name, shown after the figures in place of those of before.
            evaluation_follows: this step's validation loss comes next; its plain line shows these figures too.
        """
        self._step = step
        if self._first is None:
            self._first = (step, self._clock())
        values = (loss, validation_loss, tokens_per_second, load_cv2)
        for name, value, form in zip(FIGURES, values, (".3f", ".3f", ",.0f", ".3f"), strict=True):
            if value is not None:
                self._figures[name] = format(value, form)
        if at_work is not None:
            self._at_work = at_work
        if self._live is None:
            self._figures["validation"] = None if validation_loss is None else self._figures["validation"]
            self._line_follows = evaluation_follows
            self._plain_line(validation_loss is not None)

    def note(self, message: str) -> None:
        """Print a permanent line above the display."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if error is not None and (self._live is not None or self._line_follows):
            self._print_line()  # the live display is erased; its last figures stay

    def seconds_left(self) -> float | None:
        """Return the estimated time to the end, from the mean speed after the first step; None: unknown."""
        if self._first is None or self._step <= self._first[0]:
            return None
        step, start = self._first
        return (self._clock() - start) / (self._step - step) * (self._total - self._step)

    def _plain_line(self, evaluated: bool) -> None:
        now = self._clock()
        due = self._last_line is None or now - self._last_line >= self._plain_every
        if evaluated or ((due or self._step >= self._total) and not self._line_follows):
            self._last_line = now
            self._print_line()

    def _print_line(self) -> None:
        figures = [f"{name} {text}" for name, text in self._shown()]
        line = " · ".join([f"step {self._step}/{self._total}", *figures, self._eta()])
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _shown(self) -> Iterator[tuple[str, str]]:
        for name, text in (*self._figures.items(), *self._at_work.items()):
            if text is not None:
                yield name, text

    def _eta(self) -> str:
        left = self.seconds_left()
        if left is None:
            return "starting"
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"

    def _render(self) -> RenderableType:
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self._total, completed=self._step, complete_style="cyan", finished_style="green")
        top.add_row(Text(f"step {self._step}/{self._total}", "bold"), bar, Text(self._eta(), "cyan"))
        figures = Text("   ").join(Text.assemble((f"{name} ", "dim"), (text, "bold")) for name, text in self._shown())
        return Group(top, figures)
