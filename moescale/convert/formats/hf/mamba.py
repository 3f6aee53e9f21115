"""Mamba: layers of one mixer and nothing more, of selective state spaces."""

from __future__ import annotations

from moescale.convert.formats.hf.base import (
    ELSEWHERE,
    FLAG,
    NUMBER,
    POSITIVE,
    Family,
    Key,
    Translation,
    keys,
    only,
    rows,
)
from moescale.convert.mapping.table import Row, Transform, half, row

LAYER = "backbone.layers.{layer}."
MIXER = "blocks.{layer}.mixer."
SILU = only("silu", "swish")  # the activation of the convolution, whatever the feed-forwards have
INITIAL = {  # says how weights began, how they are computed with, or what its class works out from other keys
    "time_step_scale": 1.0, "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4,
    "time_step_init_scheme": "random", "rescale_prenorm_residual": False, "residual_in_fp32": True,
    "use_mambapy": False, "use_associative_scan": True, "intermediate_size": 1536, "d_inner": None, "d_model": None,
    "n_layer": None, "fused_add_norm": None, "pad_vocab_size_multiple": None,
}
STEP_RANK = Translation(lambda values, name: None if values.raw(name) == "auto" else values.positive(name),
                        lambda value, config: config.mamba.rank(config.model.d_model))


def one_filter_a_channel() -> Transform:
    """A convolution of each channel by itself, [channels, width], as torch keeps it: [channels, 1, width]."""
    return Transform(lambda shape, at: (shape[0], 1, shape[1]), lambda tensor, at: tensor[:, 0])


def mixer_rows(prefix: str) -> dict[tuple[str, ...], Row]:
    """Write the rows of a mixer. prefix: of its tensors in a layer"""
    return rows(
        row(MIXER + "x.weight", prefix + "in_proj.weight", half(0)),
        row(MIXER + "gate.weight", prefix + "in_proj.weight", half(1)),
        row(MIXER + "conv.weight", prefix + "conv1d.weight", one_filter_a_channel()),
        row(MIXER + "conv.bias", prefix + "conv1d.bias"),
        row(MIXER + "select.weight", prefix + "x_proj.weight"),
        row(MIXER + "scan.step", prefix + "dt_proj.weight"),
        row(MIXER + "scan.step_bias", prefix + "dt_proj.bias"),
        row(MIXER + "scan.a_log", prefix + "A_log"),
        row(MIXER + "scan.d", prefix + "D"),
        row(MIXER + "out.weight", prefix + "out_proj.weight"),
    )


BACKBONE = rows(
    row("embedding.weight", "backbone.embeddings.weight"),
    row("blocks.{layer}.mixer_norm.weight", LAYER + "norm.weight"),
    row("norm.weight", "backbone.norm_f.weight"),
    row("head.weight", "lm_head.weight"),
)
ALONE = {"model.block": "serial", "model.norm": "rmsnorm", "model.scale_logits": False}
BLOCK = keys(  # of both generations
    Key("layer_norm_epsilon", 1e-5, "model.norm_eps", NUMBER),
    Key("hidden_act", "silu", translation=SILU),
    Key("use_bias", False, translation=only(False)),
    Key("use_conv_bias", True, translation=only(True)),
    Key("rms_norm", None, translation=only(True, None)),
)
FAMILY = Family(
    "mamba", "Mamba", (("mamba", "none"),),
    keys=BLOCK | keys(
        Key("vocab_size", 50280, "model.vocab_size"),
        Key("hidden_size", 768, "model.d_model", POSITIVE),
        Key("num_hidden_layers", 32, "model.num_layers", POSITIVE),
        Key("tie_word_embeddings", True, "model.tied_embeddings", FLAG),
        Key("state_size", 16, "mamba.d_state", POSITIVE),
        Key("conv_kernel", 4, "mamba.d_conv", POSITIVE),
        Key("expand", 2, "mamba.expand", POSITIVE),
        Key("time_step_rank", "auto", "mamba.dt_rank", STEP_RANK),
        Key("ssm_cfg", None, translation=only({}, None)),
        *(Key(name, default, translation=ELSEWHERE) for name, default in INITIAL.items()),
    ),
    rows=BACKBONE | mixer_rows(LAYER + "mixer."),
    fixed={**ALONE, "mamba.inner_norms": False}, begins={"data.seq_len": 2048},
)
