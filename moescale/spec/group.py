"""What every group of a run's keys is: frozen, strict, and documented by the sentence below each key."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from moescale.errors import ConfigError

LARGEST_NUMBER = 10**12


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def sentences(cls) -> Mapping[str, str]:
        """Read the text below each key, by key. It is parsed when somebody asks, not when a run starts."""
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        found = {}
        for key, text in itertools.pairwise(tree.body):
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, ast.Expr):
                found[key.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
        return found

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        """Refuse what no run has, before anything counts up to it."""
        for key, value in self:
            if isinstance(value, int) and value > LARGEST_NUMBER:
                raise ConfigError(f"{key} must be at most {LARGEST_NUMBER:,}")
        return self
