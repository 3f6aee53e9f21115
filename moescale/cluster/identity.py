"""What must be the same on every rank, and the words for what is not."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from moescale.cluster.agreement import Agreement, ranks_text
from moescale.config import Config, ConfigError

# Paths of a node's own; the text and the tokenizer that they lead to are compared themselves.
MAY_DIFFER = {"data.cache_dir", "data.files", "data.held_out_files", "data.tokenizer"}
SHOWN_KEYS = 5
SHOWN_LETTERS = 100


def describe_run(config: Config) -> dict[str, str]:
    """Collect all that decides what a run computes, by name: each key of a settled configuration, and the code."""
    facts = {
        f"{group}.{key}": json.dumps(value)
        for group, values in config.model_dump(mode="json").items() for key, value in values.items()
        if f"{group}.{key}" not in MAY_DIFFER
    }
    return facts | {"the code of moescale": _hash_of_code(), "the version of torch": version("torch"),
                    "the version of numpy": version("numpy"),
                    "the version of Python": ".".join(map(str, sys.version_info[:2])),
                    "the version of CUDA": str(torch.version.cuda),
                    "the kind of device": "cuda" if torch.cuda.is_available() else "cpu"}


def refuse_differences(ranks: Agreement, facts: dict[str, str], advice: str) -> None:
    """Compare what all ranks say. Raises ConfigError on every rank, with each name, the values and the hosts."""
    ranks.settle(json.dumps(facts, sort_keys=True), lambda said: _refuse(said, ranks.hosts, advice))


def _refuse(said: Sequence[str], hosts: Sequence[str], advice: str) -> None:
    if len(set(said)) == 1:
        return
    parsed = {text: json.loads(text) for text in set(said)}
    names = sorted({name for facts in parsed.values() for name in facts})
    different = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, text in enumerate(said):
            holders.setdefault(parsed[text].get(name, "missing"), []).append(rank)
        if len(holders) > 1:
            different.append(f"{name} is " + ", but ".join(_held(value, who, hosts) for value, who in holders.items()))
    others = f"; and {len(different) - SHOWN_KEYS} more" if len(different) > SHOWN_KEYS else ""
    raise ConfigError("ranks differ: " + "; ".join(different[:SHOWN_KEYS]) + others + f": {advice}")


def _held(value: str, who: Sequence[int], hosts: Sequence[str]) -> str:
    places = sorted({hosts[rank] for rank in who})
    shown = ", ".join(places[:3]) + (f" and {len(places) - 3} more hosts" if len(places) > 3 else "")
    return f"{value:.{SHOWN_LETTERS}} on {ranks_text(who)} ({shown})"


def _hash_of_code() -> str:
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
