"""Console for tables."""

import os

from rich.console import Console

WIDTH = 160  # columns


def wide_console() -> Console:
    """Return a console as wide as the terminal; in a file or pipe wide enough for a table, instead of rich's 80
    columns.
    """
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)
