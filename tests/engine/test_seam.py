"""What a configuration may name, the tables hold, and nothing else."""

from __future__ import annotations

from typing import get_args

import pytest

from moescale.config import ConfigError, OptimConfig, RunConfig, parse_config
from moescale.engine.base import ENGINES
from moescale.optim.base import OPTIMIZERS


@pytest.mark.parametrize(("group", "key", "table"), [(RunConfig, "engine", ENGINES), (OptimConfig, "name", OPTIMIZERS)])
def test_names_are_those_of_the_table(group: type[RunConfig | OptimConfig], key: str, table: dict[str, object]) -> None:
    assert get_args(group.model_fields[key].annotation) == tuple(table)
    home = "run" if group is RunConfig else "optim"
    with pytest.raises(ConfigError, match=rf"{home}\.{key}='nonesuch' should be .*'{next(iter(table))}'"):
        parse_config({home: {key: "nonesuch"}}, "test")
