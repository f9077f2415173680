"""What sections are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from moe_dist.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would take `true` for 1, and its strictness would refuse numbers that YAML takes for text (1e-3)
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value does not belong here")
        return value


def require_divisible(key: str, value: int, by_key: str, by: int) -> None:
    """Refuses a key that another one does not divide."""
    if value % by:
        raise ConfigError(f"{key}={value} is not divisible by {by_key}={by}")
