"""Write the names and defaults of Megatron-LM's arguments and configuration classes into arguments.json beside this.

    git clone https://github.com/NVIDIA/Megatron-LM; git -C Megatron-LM checkout core_v0.16.1
    PYTHONPATH=Megatron-LM .venv/bin/python tests/checkpoint/megatron/arguments.py     # adds to what is there

The training script's parser is not in the package on PyPI. It needs `six` and, before 0.17, nothing else that training
with MoEScale does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import typing
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("arguments.json")


def plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    known = isinstance(value, (str, int, float, type(None))) and not isinstance(value, enum.Enum)
    return value if known else str(value)


def main() -> None:
    if not hasattr(typing, "override"):  # Python 3.11
        typing.override = lambda function: function  # type: ignore[attr-defined]
    from megatron.core import __version__
    from megatron.core.transformer import MLATransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    found = {field.name: plain(None if field.default is dataclasses.MISSING else field.default)
             for field in dataclasses.fields(MLATransformerConfig)}
    found |= {action.dest: plain(action.default) for action in parser._actions if action.dest != "help"}
    versions = json.loads(FILE.read_text()) if FILE.exists() else {}
    versions[__version__.partition("+")[0]] = dict(sorted(found.items()))
    FILE.write_text(json.dumps(versions, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
