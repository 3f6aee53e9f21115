"""Parameters and FLOPs of a configuration, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.config import Config, LayerConfig

GATED = frozenset({"swiglu", "geglu"})


@dataclass(frozen=True)
class ParameterCount:
    """total: all parameters. active: those that one token meets."""

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCount:
    """Count every weight, a tied embedding once."""
    model = config.model
    total = active = model.vocab_size * model.d_model * (1 if model.tied_embeddings else 2) + model.d_model
    for layer in model.layers:
        count = _count_layer(config, layer)
        total, active = total + count.total, active + count.active
    return ParameterCount(total, active)


def layer_flops_per_token(config: Config) -> tuple[list[int], int]:
    """Count the forward pass of one token: two a weight that it meets, four a score of attention and feature.

    -> each layer; the head
    """
    model, seq = config.model, config.data.seq_len
    seen = min(config.attention.window or seq, seq)
    attention = 4 * config.attention.num_heads * config.attention.head_dim * seen
    return ([2 * _count_layer(config, layer).active + attention for layer in model.layers],
            2 * model.vocab_size * model.d_model)


def _count_layer(config: Config, layer: LayerConfig) -> ParameterCount:
    model, moe, d_model = config.model, config.moe, config.model.d_model
    shared = config.attention.head_dim * d_model * (2 * config.attention.num_heads + 2 * config.attention.num_kv_heads)
    shared += d_model * (1 if model.block == "parallel" else 2)  # norms
    if layer.channel_mixer == "feed_forward":
        shared += d_model * config.feed_forward.d_ff * (3 if config.feed_forward.activation in GATED else 2)
        return ParameterCount(shared, shared)
    expert = d_model * moe.d_ff * (3 if moe.activation in GATED else 2)
    shared += d_model * moe.num_experts + moe.num_shared_experts * expert  # the router, and what all tokens use
    return ParameterCount(shared + moe.num_experts * expert, shared + moe.top_k * expert)


def model_flops_per_token(config: Config) -> int:
    """Count forward and backward of one token by PaLM's formula: 6 N + 12 L H Q T, N active (PaLM, appendix B)."""
    model = config.model
    attention = 12 * model.num_layers * config.attention.num_heads * config.attention.head_dim * config.data.seq_len
    return 6 * count_parameters(config).active + attention
