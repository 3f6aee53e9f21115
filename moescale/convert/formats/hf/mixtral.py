"""Mixtral: attention as Mistral's, and in every layer a mixture of experts of which each token gets the best few."""

from __future__ import annotations

from moescale.convert.formats.hf.base import (
    ACTIVATION,
    ATTENTION,
    BALANCE,
    COMMON,
    DECODER,
    EMBEDDING,
    HEAD,
    KEY_HEADS,
    LAYER,
    NUMBER,
    SEQ_LEN,
    THETA,
    WINDOW,
    Family,
    Key,
    keys,
    rows,
)
from moescale.convert.mapping.table import half, row, stacked_experts

MIXTURE, PUBLISHED, FUSED = "blocks.{layer}.channel_mixer.", LAYER + "block_sparse_moe.", LAYER + "mlp."
EXPERTS = {
    "published": rows(
        row(MIXTURE + "router.weight", PUBLISHED + "gate.weight"),
        row(MIXTURE + "experts.gate", PUBLISHED + "experts.{expert}.w1.weight"),
        row(MIXTURE + "experts.up", PUBLISHED + "experts.{expert}.w3.weight"),
        row(MIXTURE + "experts.down", PUBLISHED + "experts.{expert}.w2.weight"),
    ),
    "fused": rows(
        row(MIXTURE + "router.weight", FUSED + "gate.weight"),
        row(MIXTURE + "experts.gate", FUSED + "experts.gate_up_proj", half(0), stacked_experts()),
        row(MIXTURE + "experts.up", FUSED + "experts.gate_up_proj", half(1), stacked_experts()),
        row(MIXTURE + "experts.down", FUSED + "experts.down_proj", stacked_experts()),
    ),
}
FAMILY = Family(
    "mixtral", "Mixtral", (("attention", "moe"),),
    keys=COMMON | keys(
        Key("hidden_act", "silu", "moe.activation feed_forward.activation", ACTIVATION),
        Key("intermediate_size", 14336, "moe.d_ff"),
        Key("num_key_value_heads", 8, "attention.num_kv_heads", KEY_HEADS),
        Key("max_position_embeddings", 131072, "data.seq_len", SEQ_LEN),
        Key("rms_norm_eps", 1e-5, "model.norm_eps", NUMBER),
        Key("rope_theta", 1e6, "attention.rope_theta", THETA),
        Key("sliding_window", None, "attention.window", WINDOW),
        Key("num_local_experts", 8, "moe.num_experts", alias="num_experts"),
        Key("num_experts_per_tok", 2, "moe.top_k"),
        Key("router_aux_loss_coef", 0.001, "moe.load_balance_coefficient", BALANCE),
        Key("router_jitter_noise", 0.0, "moe.jitter", NUMBER),
    ),
    rows=EMBEDDING | ATTENTION | HEAD, experts=EXPERTS,
    fixed={**DECODER, "moe.router": "mixtral", "moe.normalize_weights": True, "moe.num_shared_experts": 0},
    begins={"moe.balance_over": "global_batch"},
)
