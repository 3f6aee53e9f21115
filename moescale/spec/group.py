"""What every group of a run's keys is: frozen, strict, and documented by the sentence below each key."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from moescale.errors import ConfigError

LARGEST_NUMBER = 10**12


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False,
                              use_attribute_docstrings=True)  # the text below a key is its description

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        """Refuse what no run has, before anything counts up to it."""
        for key, value in self:
            if isinstance(value, int) and value > LARGEST_NUMBER:
                raise ConfigError(f"{key} must be at most {LARGEST_NUMBER:,}")
        return self
