"""Options of commands and of rank tasks: each is declared once, as a field of a frozen dataclass.

The command line is built from the declarations (`moe_dist/cli/options.py`); ranks receive the values as JSON.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from moe_dist.errors import LaunchError

Options = TypeVar("Options")
KEY, WITHOUT = "option", "without"  # in the metadata of a field


@dataclass(frozen=True)
class OptionHelp:
    """Command-line side of an option.

    Attributes:
        help: one sentence for `--help`.
        flag: words of the option, such as `--kind`; None: the field's name.
        minimum, maximum: limits of a number.
        metavar: placeholder of the value in `--help`.
    """

    help: str
    flag: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    metavar: str | None = None


def option(default: Any, text: str, **details: Any) -> Any:
    """Declare a field of a specification that is an option of a command; `details` are those of `OptionHelp`."""
    return field(default=default, metadata={KEY: OptionHelp(text, **details)})


def nested(default: Any, *without: str) -> Any:
    """Declare a field that is a specification itself; its options except `without` become options of the command."""
    return field(default=default, metadata={WITHOUT: without})


def to_json(options: object) -> str:
    """Return the values of a specification as JSON in one line."""
    return TypeAdapter(type(options)).dump_json(options).decode()


def from_json(specification: type[Options], text: str) -> Options:
    """Return the specification that `to_json` wrote.

    Raises:
        LaunchError: the text is no JSON, or does not have the types of the fields.
    """
    try:
        return TypeAdapter(specification).validate_json(text)
    except ValidationError as error:
        raise LaunchError(f"--options {text!r}: {' '.join(str(error).split())}") from error
