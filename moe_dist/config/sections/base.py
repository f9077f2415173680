"""Base class and common types of configuration sections."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from moe_dist.errors import ConfigError

LARGEST_INTEGER = 2**63 - 1
"""Upper limit of all integers: the largest that torch and numpy take as a seed or size."""
LARGEST_BYTES = 10**18
"""Upper limit of byte counts: more than any machine has, and sums of them fit 64 bits."""


def _integer_of_float(value: object) -> object:
    """Convert numbers such as 2e9, which YAML reads as text, to integers."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else value


def _expanded(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    expanded = os.path.expanduser(path)
    if expanded == "~" or expanded.startswith("~/"):
        raise ValueError(
            "~ is no known folder (HOME is not set, and the user has no passwd entry): set HOME, or give a path "
            "without ~"
        )
    return expanded


Positive = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
ByteCount = Annotated[int, BeforeValidator(_integer_of_float), Field(ge=1, le=LARGEST_BYTES)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
PathText = Annotated[str, AfterValidator(_expanded)]
"""Path or glob in which `~` and `~user` are expanded."""
PathTexts = Annotated[list[PathText], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Paths; a single one needs no list."""


class Section(BaseModel):
    """Group of configuration keys: unknown keys are rejected, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_truth_values(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read `true` as 1, and its strict mode would reject numbers that YAML reads as text (1e-3)
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value does not belong here; quote it if it is text")
        return value


def require_divisible(key: str, value: int, by_key: str, by: int) -> None:
    """Reject a value that another one does not divide."""
    if value % by:
        raise ConfigError(f"{key}={value} is not divisible by {by_key}={by}")
