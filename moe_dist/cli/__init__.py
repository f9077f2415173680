"""The `moe-dist` command line; each file registers a group of commands.

Imports no torch, so that help and refusals are immediate; each command imports what it needs.
"""

import errno
import re
import sys
import traceback
from typing import Annotated

import typer

from moe_dist import __version__
from moe_dist.cli import (
    bench,
    calibrate,
    data,
    doctor,
    evaluation,
    measure,
    models,
    predict,
    report,
    reproduce,
    study,
    topology,
    training,
    weights,
)
from moe_dist.cli.groups import CommandGroup
from moe_dist.console import tolerant_output
from moe_dist.errors import EXIT_FAILURE, EXIT_REFUSED, MoeDistError, file_error
from moe_dist.launch.environment import silence_library_warnings

EXIT_INTERRUPTED = 130
VALUE_WORDS = {
    r"^Invalid value for '([^']+)': Input should be ": r"\1 must be ",
    r"a valid integer\b.*": "a whole number",
    r"a valid number\b.*": "a number",
    r"greater than or equal to ": ">= ",
    r"less than or equal to ": "<= ",
    r"greater than ": "> ",
    r"less than ": "< ",
}
"""Words of the libraries below the command line, as regular expressions, and ours."""
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or that of the click inside typer

app = typer.Typer(
    cls=CommandGroup,
    help="Train Mixture-of-Experts language models with clustered, compressed experts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for group in (
    training,
    data,
    bench,
    measure,
    study,
    reproduce,
    predict,
    calibrate,
    report,
    evaluation,
    weights,
    models,
    topology,
    doctor,
):
    group.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: a user's error is one line, only our own errors show a traceback."""
    silence_library_warnings()
    code = _exit_code(arguments)
    with tolerant_output():
        pass  # what is still buffered for a full file fails here, and not with a message at the interpreter's end
    sys.exit(code)


def _exit_code(arguments: list[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="moe-dist", standalone_mode=False)
    except UsageError as error:
        shown = getattr(error, "format_message", error.__str__)()
        command = getattr(getattr(error, "ctx", None), "command_path", "moe-dist")
        return _complain(f"{_in_our_words(' '.join(shown.split()))} (see {command} --help)", EXIT_REFUSED)
    except MoeDistError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE):
            return _complain(f"standard output cannot be written: {error.strerror}", EXIT_FAILURE)
        known = file_error(error)
        if known is None:
            traceback.print_exc()
        return _complain(str(known or f"{type(error).__name__}: {error}"), EXIT_FAILURE)
    except Exception as error:
        traceback.print_exc()
        return _complain(f"{type(error).__name__}: {error}", EXIT_FAILURE)
    return code if isinstance(code, int) else 0


def _in_our_words(usage: str) -> str:
    """Return the message about an option's value with the words of a configuration's errors."""
    for theirs, ours in VALUE_WORDS.items():
        usage = re.sub(theirs, ours, usage)
    return usage


def _complain(line: str, code: int) -> int:
    print(f"moe-dist: error: {line}", file=sys.stderr, flush=True)
    return code
