"""The first invalid value of a configuration as one line, in the words of this project."""

import reprlib
from datetime import date

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moe_dist.config.yaml_text import shortened

WHOLE, REAL, SECTION = "a whole number", "a number", "a section of keys"
KINDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), WHOLE),
    **dict.fromkeys(("float_type", "float_parsing"), REAL),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), SECTION),
    "finite_number": "a finite number",
    "string_type": "text",
    "list_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "string_pattern_mismatch": "letters and digits, and after the first of them also . _ -",
}
"""Words for what a value must be, by pydantic's type of its error."""
ALTERNATIVES = ("literal[", "constrained-", "int", "float", "str")
"""Beginnings of the last part of an error's place where a key takes values of several types."""


def first_error(error: ValidationError) -> str:
    """Return key, value and what would be right, of the first error."""
    errors = error.errors(include_url=False)
    first = errors[0]
    place, choices = first["loc"], [first]
    if place and str(place[-1]).startswith(ALTERNATIVES):
        place = place[:-1]
        choices = [one for one in errors if one["loc"][:-1] == place]
    key = ".".join(str(part) for part in place) or "configuration"
    given = first.get("input")
    shown = "" if isinstance(given, dict) else f"={_shown(given)}"
    quote = ": quote it if it is text" if first["type"] == "string_type" and not isinstance(given, list) else ""
    wanted = [found for one in choices if (found := _wanted(one)) is not None]
    if not wanted:
        return f"{key}{shown}: {_message(first)}"
    return f"{key}{shown} must be {' or '.join(dict.fromkeys(wanted))}{quote}"


def _wanted(error: ErrorDetails) -> str | None:
    """Return what a value must be; None: the error is another one."""
    words = KINDS.get(error["type"])
    return None if words is None else words.format(**error.get("ctx", {}))


def _message(error: ErrorDetails) -> str:
    message = " ".join(str(error["msg"]).split()).removeprefix("Value error, ")
    return "is missing" if error["type"] == "missing" else message


def _shown(value: object) -> str:
    if isinstance(value, date):
        return str(value)
    try:
        return reprlib.repr(value) if isinstance(value, (list, tuple, set)) else shortened(repr(value), 300)
    except ValueError:  # an integer of more digits than Python converts
        return "a number of thousands of digits"
