"""Mamba-2: layers of one mixer and nothing more, of state spaces with one decay a head."""

from __future__ import annotations

import math

from torch import Tensor

from moescale.checkpoint.strided_view import Shape
from moescale.convert.formats.hf.base import (
    ELSEWHERE,
    FLAG,
    POSITIVE,
    ConfigJson,
    Family,
    Key,
    Translation,
    keys,
    rows,
    shorten,
)
from moescale.convert.formats.hf.mamba import ALONE, BACKBONE, BLOCK, LAYER, MIXER, one_filter_a_channel
from moescale.convert.mapping.table import At, Transform, row

THEIRS = LAYER + "mixer."
IN_PROJ, CONVOLUTION = ("gate", "x", "select", "step"), ("x", "select")  # which lie one after another in one matrix


def _stacked(parts: tuple[str, ...], part: str) -> Transform:
    """Put the rows of several of a layer's matrices into one. part: whose rows they are, by the matrix of ours."""
    before = parts[: parts.index(part)]

    def rows_of(part: str, at: At) -> int:
        mamba2, d_model = at.config.mamba2, at.config.model.d_model
        return {"step": mamba2.num_heads(d_model), "select": 2 * mamba2.num_groups * mamba2.d_state}.get(
            part, mamba2.d_inner(d_model))

    def shape(native: Shape, at: At) -> Shape:
        return (sum(rows_of(each, at) for each in parts), *native[1:])

    def view(tensor: Tensor, at: At) -> Tensor:
        first = sum(rows_of(each, at) for each in before)
        return tensor[first : first + rows_of(part, at)]

    return Transform(shape, view)


def _read_heads(values: ConfigJson, name: str) -> int:
    """Read the channels of a head, of which `name` says how many heads there are."""
    heads, head_dim = values.positive(name), values.positive("head_dim")
    channels = values.positive("expand") * values.positive("hidden_size")
    if heads * head_dim != channels:
        values.refuse(f"{name}={heads} x head_dim={head_dim} must be expand x hidden_size={channels}: use other heads")
    return head_dim


def _check_limit(values: ConfigJson, name: str) -> None:
    """Refuse bounds of steps. Infinity is the number, or an object with its name."""
    limit = values.raw(name)
    ends = [float(end["__float__"]) if isinstance(end, dict) and end.get("__float__") == "Infinity" else end
            for end in limit] if isinstance(limit, (list, tuple)) else limit
    if ends != [0.0, math.inf]:
        values.refuse(f"{name}={shorten(limit)} cannot be expressed by MoEScale: only 0 to infinity can")


INITIAL = {  # says how weights began, how they are computed with, or what no computation uses
    "time_step_rank": "auto", "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "chunk_size": 256,
}
FAMILY = Family(
    "mamba2", "Mamba2", (("mamba2", "none"),),
    keys=BLOCK | keys(
        Key("vocab_size", 32768, "model.vocab_size"),
        Key("hidden_size", 4096, "model.d_model", POSITIVE),
        Key("num_hidden_layers", 64, "model.num_layers", POSITIVE),
        Key("tie_word_embeddings", False, "model.tied_embeddings", FLAG),
        Key("state_size", 128, "mamba2.d_state", POSITIVE),
        Key("conv_kernel", 4, "mamba2.d_conv", POSITIVE),
        Key("expand", 2, "mamba2.expand", POSITIVE),
        Key("n_groups", 8, "mamba2.num_groups", POSITIVE),
        Key("head_dim", 64, "mamba2.head_dim", POSITIVE),
        Key("num_heads", 128, "mamba2.head_dim", Translation(
            _read_heads, lambda value, config: config.mamba2.num_heads(config.model.d_model))),
        Key("time_step_limit", [0.0, math.inf], translation=Translation(_check_limit)),
        *(Key(name, default, translation=ELSEWHERE) for name, default in INITIAL.items()),
    ),
    rows=BACKBONE | rows(
        *(row(f"{MIXER}{part}.weight", THEIRS + "in_proj.weight", _stacked(IN_PROJ, part)) for part in IN_PROJ),
        *(entry for ours, part in (("conv", "x"), ("select_conv", "select")) for entry in (
            row(f"{MIXER}{ours}.weight", THEIRS + "conv1d.weight", one_filter_a_channel(), _stacked(CONVOLUTION, part)),
            row(f"{MIXER}{ours}.bias", THEIRS + "conv1d.bias", _stacked(CONVOLUTION, part)))),
        row(MIXER + "scan.step_bias", THEIRS + "dt_bias"),
        row(MIXER + "scan.a_log", THEIRS + "A_log"),
        row(MIXER + "scan.d", THEIRS + "D"),
        row(MIXER + "norm.weight", THEIRS + "norm.weight"),
        row(MIXER + "out.weight", THEIRS + "out_proj.weight"),
    ),
    fixed=ALONE, begins={"data.seq_len": 2048},
)
