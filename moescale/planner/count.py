"""Parameters and FLOPs of a configuration, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.config import Config

GATED = frozenset({"swiglu", "geglu"})


@dataclass(frozen=True)
class ParameterCount:
    """total: all parameters. active: those that one token meets."""

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCount:
    """Count every weight, a tied embedding once."""
    model, moe = config.model, config.moe
    d_model, norm = model.d_model, model.d_model
    attention = model.head_dim * d_model * (2 * model.num_heads + 2 * model.num_kv_heads)
    total = active = model.vocab_size * d_model * (1 if model.tied_embeddings else 2) + norm
    for layer in model.layers:
        shared = attention + norm * (1 if model.block == "parallel" else 2)
        if layer.channel_mixer == "moe":
            expert = d_model * moe.d_ff * (3 if moe.activation in GATED else 2)
            shared += d_model * moe.num_experts  # the router
            total, active = total + moe.num_experts * expert, active + moe.top_k * expert
        else:
            shared += d_model * model.d_ff * (3 if model.activation in GATED else 2)
        total, active = total + shared, active + shared
    return ParameterCount(total, active)


def model_flops_per_token(config: Config) -> int:
    """Count forward and backward of one token by PaLM's formula: 6 N + 12 L H Q T, N active (PaLM, appendix B)."""
    model = config.model
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * config.data.seq_len
    return 6 * count_parameters(config).active + attention
