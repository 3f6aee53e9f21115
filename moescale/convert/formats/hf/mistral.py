"""Mistral: a dense decoder whose queries see a window. Without one it equals a Llama, and is written as one."""

from __future__ import annotations

from moescale.convert.formats.hf.base import (
    ATTENTION,
    COMMON,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    KEY_HEADS,
    NUMBER,
    SEQ_LEN,
    THETA,
    WINDOW_ALWAYS,
    Family,
    Key,
    keys,
)

FAMILY = Family(
    "mistral", "Mistral", (("attention", "feed_forward"),),
    keys=COMMON | keys(
        Key("intermediate_size", 14336, "feed_forward.d_ff"),
        Key("num_key_value_heads", 8, "attention.num_kv_heads", KEY_HEADS),
        Key("max_position_embeddings", 131072, "data.seq_len", SEQ_LEN),
        Key("rms_norm_eps", 1e-6, "model.norm_eps", NUMBER),
        Key("rope_theta", 1e4, "attention.rope_theta", THETA),
        Key("sliding_window", 4096, "attention.window", WINDOW_ALWAYS),
    ),
    rows=EMBEDDING | ATTENTION | FEED_FORWARD | HEAD,
)
