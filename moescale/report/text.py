"""The part of the page that shows where held-out text went."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from moescale.errors import visible
from moescale.record.figures import of_layer
from moescale.record.held_out import SHOWN_TOKENS, HeldOutRouting
from moescale.report.content import CLASSES, content_classes, file_kinds, pair_preference, preference, repetition
from moescale.report.history import History
from moescale.report.svg import LINES, as_html, cell_map, load_classes, run_class

ENOUGH_TOKENS = 20  # of a kind, to say who gets them
MOST_KINDS = 24
TABLES = {
    "kinds": "who gets what: rows of each kind of text, over an even share",
    "files": "by kind of file: rows of each, over an even share",
    "pairs": "pairs of experts that share tokens, over what their loads alone would give",
}
MOST_PAIRS = 1_000_000  # layers x experts x experts


def text_section(run: History, index: int) -> tuple[str, dict[str, Any]]:
    """Give HTML of the last layer, and what the script shows of the others; both empty where nothing was kept."""
    routing, experts = HeldOutRouting.load(run.directory), run.config.moe.num_experts
    if routing is None or not routing.expert.size or not routing.fits(run.layers, experts):
        return "", {}
    tables = {"kinds": _shares(routing, CLASSES, content_classes(routing), experts)}
    files = _shares(routing, *file_kinds(routing), experts)
    if len(files[0]) > 1:
        tables["files"] = files
    if routing.expert.shape[2] > 1 and len(routing.layers) * experts**2 <= MOST_PAIRS:
        tables["pairs"] = [f"expert {expert}" for expert in range(experts)], pair_preference(routing, experts)
    options = "".join(f'<option value="{index}"{" selected" if index == len(routing.layers) - 1 else ""}>layer {layer}'
                      "</option>" for index, layer in enumerate(routing.layers))
    columns = ("expert 0", f"expert {experts - 1}")
    maps = "".join(
        f'<figure><figcaption>{TABLES[key]} <span class="reading"></span></figcaption>'
        + cell_map(load_classes(values[-1]), names, columns, label=TABLES[key], name=f"{key}{index}", readings=key)
        + "</figure>" for key, (names, values) in tables.items())
    html = (
        f'<section><h2>Where text goes <span class="of {run_class(index)}">{as_html(run.name)}</span></h2><p>'
        f"Held-out text at step {routing.step:,}; a colour is a token's first expert, here in layer "
        f"<b>{routing.layers[-1]}</b>. Pointing at a token names its experts, their weights, and the router's largest "
        "probabilities.</p>"
        f'<label class="pick">layer <select data-run="{index}">{options}</select></label>'
        '<figure><figcaption class="said"><span class="reading"></span></figcaption>'
        f"{_coloured(routing, index)}</figure>"
        f'<div class="pair">{maps}</div>{_repetition(run, routing)}</section>'
    )
    shown = slice(0, SHOWN_TOKENS)
    return html, {
        "shown": {"layers": routing.layers.tolist(), "tokens": routing.likely.shape[1],
                  "expert": _packed(routing.expert[:, shown].astype("<i2")),
                  "weight": _packed(np.rint(routing.weight[:, shown] * 100).astype("<i2")),
                  "likely": _packed(routing.likely.astype("<i2")),
                  "probability": _packed(np.rint(routing.probability.astype(float) * 1000).astype("<i2"))},
        "tables": {key: {"rows": names, "codes": _packed(load_codes(values))}
                   for key, (names, values) in tables.items()},
    }


def _shares(
    routing: HeldOutRouting, names: Sequence[str], kinds: np.ndarray, experts: int
) -> tuple[list[str], np.ndarray]:
    """Take the first MOST_KINDS that enough tokens are of: their names, and [layers, kinds, experts]."""
    present = [kind for kind in range(len(names)) if (kinds == kind).sum() >= ENOUGH_TOKENS][:MOST_KINDS]
    return [visible(names[kind]) for kind in present], preference(routing, kinds, len(names), experts)[:, present]


def load_codes(loads: np.ndarray) -> np.ndarray:
    """Put loads in one byte each, `128 + 24 log2(load)`; 0 = next to none. -> uint8"""
    code = np.clip(np.rint(128 + 24 * np.log2(np.maximum(loads, 1e-9))), 1, 255)
    return np.where(loads < 0.01, 0, code).astype(np.uint8)


def _packed(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _coloured(routing: HeldOutRouting, index: int) -> str:
    """Colour each token by its first expert in the last layer."""
    spans = []
    for token, (piece, experts, weights, likely, probabilities) in enumerate(zip(
        routing.pieces[:SHOWN_TOKENS], *(values[-1].tolist() for values in (
            routing.expert, routing.weight, routing.likely, routing.probability)), strict=False
    )):
        title = ", ".join(f"expert {expert} {weight:.2f}"
                          for expert, weight in zip(experts, weights, strict=True) if expert >= 0)
        best = ", ".join(f"{expert} {probability:.1%}"
                         for expert, probability in zip(likely, probabilities, strict=True) if expert >= 0)
        style = f'style="--hue:{hue(experts[0])}"' if experts[0] >= 0 else 'class="none"'
        begins = "data-begins " if token and token % routing.seq_len == 0 else ""
        title = f"{title or 'no expert'}; probabilities {best}"
        spans.append(f'<span {begins}{style} title="{title}">{as_html(piece, LINES)}</span>')
    return f'<div class="text" data-run="{index}">{"".join(spans)}</div>'


def hue(expert: int) -> int:
    """Give each expert a hue, neighbours far apart; `report.js` does the same."""
    return round(expert * 137.508) % 360


def _repetition(run: History, routing: HeldOutRouting) -> str:
    rows = "".join(
        f"<tr><th>layer {layer}</th><td>{each.first:.1%}</td><td>{each.first_by_chance:.1%}</td>"
        f"<td>{each.either:.1%}</td><td>{each.either_by_chance:.1%}</td><td>{_moved(run, int(layer))}</td></tr>"
        for layer, each in zip(routing.layers, repetition(routing), strict=True))
    return ('<h3>Consecutive tokens with the same expert, and tokens in random order</h3><div class="scroll"><table>'
            "<thead><tr><th></th><th>same first</th><th>at random</th><th>one in common</th><th>at random</th>"
            f"<th>moved</th></tr></thead><tbody>{rows}</tbody></table></div><p>Moved: the share of tokens with other "
            f"experts than {run.config.monitor.moved_every or 0:,} steps before, at the last look.</p>")


def _moved(run: History, layer: int) -> str:
    curve = run.curves.get(of_layer("moved", layer))
    return f"{curve.values[-1]:.1%}" if curve is not None else "-"
