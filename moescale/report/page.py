"""`moescale report`: one page that holds all it shows, static pictures first and a script that makes them move."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moescale.config import ConfigError
from moescale.planner.count import count_parameters
from moescale.record.figures import of_all
from moescale.report.characters import furthest
from moescale.report.history import History
from moescale.report.side_by_side import compare
from moescale.report.svg import as_html, cell_map, line_chart, load_classes, run_class, share_classes
from moescale.report.text import load_codes, text_section

PAGE = Path(__file__).parent / "assets"
CURVES = {  # a figure's key: its title, its unit
    "loss": ("loss", " nats a token"), "eval_loss": ("held-out loss", " nats a token"),
    "tokens_per_second": ("throughput", " tokens/s"), "grad_norm": ("gradient norm", ""),
    of_all("max_load"): ("load of the busiest expert over the mean", ""),
    of_all("min_load"): ("load of the idlest expert over the mean", ""),
    of_all("load_cv"): ("coefficient of variation of the load", ""), of_all("dropped_share"): ("share dropped", ""),
    of_all("capacity_used"): ("share of slots used", ""), of_all("dead_experts"): ("experts without a row", ""),
    of_all("entropy"): ("entropy of the router", " nats"), of_all("confidence"): ("largest probability of a token", ""),
    "load_balance_loss": ("balance loss", " (1 = balanced)"), "router_z_loss": ("router z-loss", ""),
    of_all("other_ranks"): ("tokens that travel to other ranks", ""),
    of_all("other_nodes"): ("tokens that travel to other nodes", ""),
    of_all("moved"): ("held-out tokens that changed experts", ""), "memory_bytes": ("most memory of a rank", " bytes"),
}
TILES = {  # a key of the last line: what it is called, how it is written
    "loss": ("loss", "{:.4f}"), "tokens_per_second": ("tokens/s", "{:,.0f}"),
    of_all("max_load"): ("busiest expert", "{:.2f}x"), of_all("min_load"): ("idlest", "{:.2f}x"),
    of_all("dropped_share"): ("dropped", "{:.1%}"),
}
MOST_IN_FULL = 3  # runs; of more, what concerns one alone is folded
LEGEND = '<p class="legend"><i class="k0"></i>none <i class="k1"></i>¼ <i class="k3"></i>½ <i class="k6"></i>mean ' \
         '<i class="k8"></i>2 <i class="k11"></i>4 times</p>'


def write_report(runs: Sequence[History], path: Path) -> None:
    """Write the page of some runs, laid over each other. Raises ConfigError when it cannot be written."""
    title = as_html(" · ".join(run.name for run in runs) if len(runs) <= MOST_IN_FULL else f"{len(runs)} runs")
    sections, moving = zip(*(_run(run, index) for index, run in enumerate(runs)), strict=True)
    headings = [_heading(run, index) for index, run in enumerate(runs)]
    if len(runs) > MOST_IN_FULL:
        parts = [
            f'<details><summary class="of {run_class(index)}">{as_html(run.name)}</summary>{heading}{section}</details>'
            for index, (run, heading, section) in enumerate(zip(runs, headings, sections, strict=True))]
        body = [f'<header><h1 class="all">{title}</h1></header>', _compared(runs), _curves(runs), *parts]
    else:
        body = ["<header>", *headings, "</header>", _compared(runs), _curves(runs), *sections]
    data = json.dumps(moving, separators=(",", ":")).replace("<", "\\u003c")
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
        f'<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head><body><main>'
        f'{"".join(body)}</main><script type="application/json" id="data">{data}</script><script>{script}</script>'
        "</body></html>"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}: give another path with -o") from None


def _heading(run: History, index: int) -> str:
    count, last = count_parameters(run.config), run.last
    tiles = {"step": f"{run.step:,} of {run.config.run.steps:,}",
             "parameters": f"{_large(count.total)}, {_large(count.active)} active", "ranks": _layout(run)}
    tiles |= {title: form.format(last[key]) for key, (title, form) in TILES.items() if key in last}
    if "eval_loss" in run.curves:
        tiles["held-out loss"] = f"{run.curves['eval_loss'].values[-1]:.4f}"
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in tiles.items())
    alerts = "".join(f"<li>step {step:,}: {as_html(text)}</li>" for step, text in run.alerts[-20:])
    return (f'<h1 class="{run_class(index)}">{as_html(run.name)}</h1><dl class="tiles">{cells}</dl>'
            + (f'<ul class="alerts">{alerts}</ul>' if alerts else '<p class="quiet">No alert.</p>'))


def _compared(runs: Sequence[History]) -> str:
    """A table of several runs, with the keys in which they differ."""
    if len(runs) == 1:
        return ""
    titles, *rows = compare(runs)
    head = "".join(f"<th>{as_html(title).replace('.', '.<wbr>').replace('_', '_<wbr>')}</th>" for title in titles)
    body = "".join(
        f'<tr><th><i class="key {run_class(index)}"></i>{as_html(name)}</th>'
        + "".join(f'<td title="{as_html(cell)}">{as_html(cell)}</td>' for cell in cells) + "</tr>"
        for index, (name, *cells) in enumerate(rows))
    note = "" if "." in "".join(titles) else "<p>Their configurations do not differ.</p>"
    return ('<section><h2>Runs, and the keys in which they differ</h2><div class="scroll"><table class="runs"><thead>'
            f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</section>")


def _curves(runs: Sequence[History]) -> str:
    charts, zero = [], []
    for key, (title, unit) in CURVES.items():
        curves = [(run.name, index, run.curves[key]) for index, run in enumerate(runs) if key in run.curves]
        if curves and not any(curve.values.any() for *_, curve in curves):
            zero.append(title)
        else:
            charts.append(line_chart(title, curves, unit))
    note = f"<p>Zero throughout: {', '.join(zero)}.</p>" if zero else ""
    return f'<section><h2>Over time</h2><div class="charts">{"".join(charts)}</div>{note}</section>'


def _run(run: History, index: int) -> tuple[str, dict[str, Any]]:
    """What is shown of each run by itself. -> HTML, and what the script moves"""
    text, of_text = text_section(run, index)
    config = (f"<details><summary>Configuration of {as_html(run.name)}</summary>"
              f"<pre>{escape(run.config.to_yaml())}</pre>")
    loads = base64.b64encode(load_codes(run.loads).tobytes()).decode()
    moving = {"frames": run.frames.tolist(), "layers": run.layers, "experts": run.loads.shape[2], "loads": loads}
    return _loads(run, index) + text + _travel(run) + config + "</details>", moving | of_text


def _loads(run: History, index: int) -> str:
    if not len(run.frames):
        return ""
    layers, experts = [f"layer {layer}" for layer in run.layers], run.loads.shape[2]
    over_time = load_classes(run.loads.max(2).T)
    slider = (f'<label class="slider">step <output>{run.frames[-1]:,}</output><input type="range" min="0" '
              f'max="{len(run.frames) - 1}" value="{len(run.frames) - 1}" data-run="{index}"></label>')
    final = run.loads[-1]
    worst = "".join(f"<li>layer {run.layers[row]}, expert {column}: {final[row, column]:.2f} times the mean</li>"
                    for row, column in furthest(final, 5))
    return (
        f'<section><h2>Load of each expert <span class="of {run_class(index)}">{as_html(run.name)}</span></h2>'
        + LEGEND +
        f'<div class="pair"><figure><figcaption>rows over the layer\'s mean, each layer and expert '
        f'<span class="reading"></span></figcaption>{slider}'
        + cell_map(load_classes(final), layers, ("expert 0", f"expert {experts - 1}"), name=f"load{index}",
                   label="load of each layer and expert at the last step", readings="load")
        + '</figure><figure><figcaption>the busiest expert of each layer, over time <span class="reading"></span>'
          "</figcaption>"
        + cell_map(over_time, layers, (f"step {run.frames[0]:,}", f"{run.frames[-1]:,}"), name=f"time{index}",
                   label="load of the busiest expert of each layer over time", readings="time")
        + f'</figure></div><h3>Furthest from the mean</h3><ol class="worst">{worst}</ol></section>'
    )


def _travel(run: History) -> str:
    rows = run.rows
    if not len(rows):
        return ""
    parallel = run.config.parallel
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.tp * parallel.cp * parallel.pp
    size = -(-ranks // len(rows))
    names = [f"rank {block}" if size == 1 else f"ranks from {-(-block * ranks // len(rows))}"
             for block in range(len(rows))]
    away = rows.copy()
    np.fill_diagonal(away, 0)
    table = "".join(
        f"<tr><th>{name}</th><td>{sent:,.0f}</td><td>{received:,.0f}</td><td>{stays:,.0f}</td></tr>"
        for name, sent, received, stays in zip(names, away.sum(1), away.sum(0), rows.diagonal(), strict=True))
    sent = run.last.get(of_all("bytes_sent"), 0) / 1e6
    return (
        f'<section><h2>Rows between ranks</h2><p>In step {run.step:,}, all layers, on the way to the experts; '
        f'{sent:,.1f} MB between ranks. As much comes back, and backward sends both again.'
        '</p><div class="pair"><figure><figcaption>from (rows) to (columns) <span class="reading"></span></figcaption>'
        + cell_map(share_classes(rows), names, (names[0], names[-1]), label="rows between ranks",
                   readings="\n".join(" ".join(f"{value:.15g}" for value in line) for line in rows))
        + '</figure><table><thead><tr><th></th><th>sent</th><th>received</th><th>stayed</th></tr></thead><tbody>'
        + table + "</tbody></table></div></section>"
    )


def _layout(run: History) -> str:
    parallel = run.config.parallel
    degrees = {key: getattr(parallel, key) for key in ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")}
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.tp * parallel.cp * parallel.pp
    named = ", ".join(f"{key} {degree}" for key, degree in degrees.items() if degree > 1)
    return f"{ranks} ({named})" if named else str(ranks)


def _large(count: int) -> str:
    return f"{count / 1e9:,.1f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"
