"""Console for tables, and output whose loss ends nothing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 160  # columns


def wide_console() -> Console:
    """Return a console as wide as the terminal; in a file or pipe wide enough for a table, instead of rich's 80
    columns.
    """
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def titled_table(title: str, *columns: str, **options: Any) -> Table:
    """Return a table with a title on its left, not wrapped to the table's width; options are those of `Table`."""
    text = Text(title, style="table.title", no_wrap=True, overflow="ignore")
    return Table(*columns, title=text, title_justify="left", box=SIMPLE, **options)


class TolerantOutput:
    """Text stream that drops its output from the moment it cannot be written, such as in a full file or a closed pipe.

    Args:
        warn: stream that gets one line about it; None: no line.
    """

    def __init__(self, stream: TextIO, warn: "TolerantOutput | None" = None) -> None:
        self._stream, self._warn, self._lost = stream, warn, False

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        if not self._lost:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless its output is dropped."""
        if not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self._lost = True
        if self._warn is not None:
            self._warn.write(
                f"moe-dist: warning: standard output cannot be written: {error.strerror}: it is dropped from here on\n"
            )
            self._warn.flush()
        with suppress(OSError, ValueError):  # what is still buffered would fail again at the process's end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Drop standard output and standard error where they cannot be written, instead of failing."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, TolerantOutput) or None in before:
        yield
        return
    errors = TolerantOutput(sys.stderr)
    sys.stdout, sys.stderr = TolerantOutput(sys.stdout, errors), errors
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
