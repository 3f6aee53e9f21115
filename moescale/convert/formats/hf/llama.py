"""Llama: a dense decoder whose queries see all positions before them."""

from __future__ import annotations

from moescale.convert.formats.hf.base import (
    ATTENTION,
    COMMON,
    DECODER,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    KEY_HEADS,
    NUMBER,
    SEQ_LEN,
    THETA,
    ConfigJson,
    Family,
    Key,
    Translation,
    keys,
)

HEADS = Translation(ConfigJson.positive, fits=lambda value, config: config.model.d_model % value == 0)
FAMILY = Family(
    "llama", "Llama", (("attention", "feed_forward"),),
    keys=COMMON | keys(
        Key("num_attention_heads", 32, "attention.num_heads", HEADS),  # its class wants hidden_size to be a multiple
        Key("intermediate_size", 11008, "feed_forward.d_ff"),
        Key("num_key_value_heads", None, "attention.num_kv_heads", KEY_HEADS),
        Key("max_position_embeddings", 2048, "data.seq_len", SEQ_LEN),
        Key("rms_norm_eps", 1e-6, "model.norm_eps", NUMBER),
        Key("rope_theta", 1e4, "attention.rope_theta", THETA),
    ),
    rows=EMBEDDING | ATTENTION | FEED_FORWARD | HEAD,
    fixed={**DECODER, "attention.window": None},
    constants={"attention_bias": False, "mlp_bias": False},
)
