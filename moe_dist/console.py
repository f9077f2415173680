"""Where tables are shown."""

import os

from rich.console import Console

WIDTH = 160  # columns


def wide_console() -> Console:
    """As wide as the terminal; in a file or a pipe wide enough for a table, where rich would cut it to 80 columns."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)
