"""What a checkpoint holds, as a table or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moescale.convert.fingerprint import digests, fingerprints
from moescale.convert.mapping.mapped import Opened, weights_of
from moescale.errors import visible


def describe(opened: Opened) -> dict[str, Any]:
    """Read all of it: format, layout, sizes, dtypes, and the fingerprints of layers and experts."""
    config = opened.config
    found = {name: digests(opened.weights[name], values) for name, values in weights_of(opened)}
    dtypes = Counter(str(stored.dtype).removeprefix("torch.") for stored in opened.tensors.values())
    mixtures = config.num_moe_layers
    return {
        "format": opened.format, "path": str(opened.path), "layout": vars(opened.layout),
        "layers": config.model.num_layers, "moe_layers": mixtures,
        "experts": config.moe.num_experts if mixtures else 0, "top_k": config.moe.top_k if mixtures else 0,
        "router": config.moe.router if mixtures else None,
        "d_model": config.model.d_model, "vocab_size": config.model.vocab_size,
        "tensors": len(opened.tensors), "dtypes": dict(dtypes),
        "bytes": sum(stored.size_bytes for stored in opened.tensors.values()),
        "optimizer_state": any(name.moment is not None for name in opened.weights),
        "left_out": dict(opened.left_out), "fingerprints": fingerprints(opened.weights, found),
    }


def print_description(values: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for key, value in values.items():
        if key == "fingerprints":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
        table.add_row(key.replace("_", " "), Text(f"{value:,}" if isinstance(value, int) else visible(str(value))))
    console = Console()
    console.print(table)
    print_fingerprints(values["fingerprints"])


def print_fingerprints(found: Mapping[str, str]) -> None:
    """One line for what is not in layers, one for each layer with its experts."""
    experts: dict[str, list[str]] = {}
    for name, digest in found.items():
        head, expert, _ = name.partition(" expert ")
        experts.setdefault(head, []).append(digest if not expert else digest[:8])
    table = Table("fingerprint of", "", "experts in order", box=None)
    for head in experts:
        experts_of_layer, *rest = experts[head]
        table.add_row(head, experts_of_layer, " ".join(rest))
    Console().print(table)

