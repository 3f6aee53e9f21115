"""Parameters and FLOPs of a configuration, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from moescale.config import Config
from moescale.spec.model import describe
from moescale.spec.moe import MoEConfig


@dataclass(frozen=True)
class ParameterCount:
    """total: all parameters. active: those that one token meets."""

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCount:
    """Count every weight, a tied embedding once."""
    model = describe(config)
    total = sum(weight.size for weight in model.weights() if weight.learns)
    not_met = 0
    for index, layer in enumerate(model.layers):
        if isinstance(layer.channel_mixer, MoEConfig):
            experts, top_k = layer.channel_mixer.num_experts, layer.channel_mixer.top_k
            stacked = sum(weight.size for weight in model.layer_weights(index) if weight.view == "sparse")
            not_met += stacked // experts * (experts - top_k)
    return ParameterCount(total, total - not_met)


def layer_flops_per_token(config: Config) -> tuple[list[int], int]:
    """Count the forward pass of one token, of each layer and of the head."""
    d_model, context = config.model.d_model, config.data.seq_len
    layers = [sum(part.flops_per_token(d_model, context) for part in (layer.mixer, layer.channel_mixer) if part)
              for layer in describe(config).layers]
    return layers, 2 * config.model.vocab_size * d_model


def model_flops_per_token(config: Config) -> int:
    """Count forward and backward of one token by PaLM's formula: 6 N + 12 L H Q T, N active (PaLM, appendix B).

    The second term is that of scores, which only attention has.
    """
    features = sum(layer.mixer.score_features for layer in config.layers)
    return 6 * count_parameters(config).active + 12 * features * config.data.seq_len
