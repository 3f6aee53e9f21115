"""Names in YAML -> classes: the only place that knows every table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moescale.config import Config
from moescale.layers.feed_forward import FeedForward
from moescale.layers.linear import Embedding, Linear
from moescale.layers.norm import NORMS
from moescale.layers.residual import ReZero
from moescale.mixers.attention import Attention
from moescale.mixers.base import Mixer
from moescale.model.block import Block
from moescale.model.language_model import LanguageModel
from moescale.moe.experts import Experts
from moescale.moe.layer import MoELayer
from moescale.moe.routers import ROUTERS, Capacity
from moescale.ops.attention_pattern import Visibility
from moescale.spec.attention import AttentionConfig
from moescale.spec.feed_forward import FeedForwardConfig
from moescale.spec.hippo import HippoConfig
from moescale.spec.linear_attention import LinearAttentionConfig
from moescale.spec.lmu import LmuConfig
from moescale.spec.lssl import LsslConfig
from moescale.spec.mamba import MambaConfig
from moescale.spec.mamba2 import Mamba2Config
from moescale.spec.mixer import MixerConfig
from moescale.spec.model import Layer, ModelConfig
from moescale.spec.moe import OWN_KEYS, MoEConfig
from moescale.spec.s4 import S4Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _attention(model: ModelConfig, keys: AttentionConfig) -> Attention:
    return Attention(
        model.d_model, keys.num_heads, keys.num_kv_heads, keys.head_dim,
        visibilities=[Visibility(**seen) for seen in keys.visibilities],
        rope_theta=keys.rope_theta if keys.positions == "rope" else None, alibi=keys.positions == "alibi",
    )


# A mixer that most runs do not have is imported by the run that has it.


def _hippo(model: ModelConfig, keys: HippoConfig) -> Mixer[Any]:
    from moescale.mixers.hippo import Hippo
    from moescale.ops.hippo_memory import Memory

    return Hippo(model.d_model, keys.channels, Memory(keys.measure, keys.d_state, keys.theta))


def _lmu(model: ModelConfig, keys: LmuConfig) -> Mixer[Any]:
    from moescale.mixers.lmu import Lmu
    from moescale.ops.hippo_memory import Memory

    memory = Memory("lmu", keys.order, keys.theta)
    return Lmu(model.d_model, keys.memories, keys.units, memory, recurrent=keys.recurrent)


def _linear_attention(model: ModelConfig, keys: LinearAttentionConfig) -> Mixer[Any]:
    from moescale.mixers.linear_attention import LinearAttention

    return LinearAttention(model.d_model, keys.num_heads, keys.head_dim)


def _mamba(model: ModelConfig, keys: MambaConfig) -> Mixer[Any]:
    from moescale.mixers.mamba import Mamba

    d_model = model.d_model
    return Mamba(
        d_model, keys.d_inner(d_model), d_state=keys.d_state, d_conv=keys.d_conv, rank=keys.rank(d_model),
        norm_eps=model.norm_eps if keys.inner_norms else None)


def _mamba2(model: ModelConfig, keys: Mamba2Config) -> Mixer[Any]:
    from moescale.mixers.mamba2 import Mamba2

    return Mamba2(
        model.d_model, keys.d_inner(model.d_model), head_dim=keys.head_dim, groups=keys.num_groups,
        d_state=keys.d_state, d_conv=keys.d_conv, norm_eps=model.norm_eps)


def _lssl(model: ModelConfig, keys: LsslConfig) -> Mixer[Any]:
    from moescale.mixers.state_space import LsslSystems, StateSpace

    systems = LsslSystems(model.d_model, keys.outputs, keys.d_state, keys.alpha)
    return StateSpace(model.d_model, keys.outputs, systems, gated=False)


def _s4(model: ModelConfig, keys: S4Config) -> Mixer[Any]:
    from moescale.mixers.state_space import DiagonalSystems, DplrSystems, StateSpace, Systems

    systems: Systems
    if keys.form == "dplr":
        systems = DplrSystems(model.d_model, keys.d_state)
    else:
        systems = DiagonalSystems(model.d_model, keys.d_state, keys.discretization)
    return StateSpace(model.d_model, 1, systems, gated=keys.output == "glu")


MIXERS: dict[type[MixerConfig], Callable[[ModelConfig, Any], Mixer[Any]]] = {  # a kind: what makes it of its keys
    AttentionConfig: _attention,
    HippoConfig: _hippo,
    LinearAttentionConfig: _linear_attention,
    LmuConfig: _lmu,
    LsslConfig: _lssl,
    MambaConfig: _mamba,
    Mamba2Config: _mamba2,
    S4Config: _s4,
}


def build_model(config: Config, device: torch.device | str = "meta") -> LanguageModel:
    """Make the model that the configuration describes, its parameters not yet filled.

    device: where they lie; "meta" takes no memory.
    """
    model = config.model
    compute_dtype = DTYPES[config.precision.compute]
    with torch.device(device):
        whole = LanguageModel(
            Embedding(model.vocab_size, model.d_model),
            {index: _block(config, layer, index) for index, layer in enumerate(config.layers)},
            NORMS[model.norm](model.d_model, model.norm_eps),
            None if model.tied_embeddings else Linear(model.d_model, model.vocab_size),
            logit_scale=model.d_model**-0.5 if model.scale_logits else 1.0,
            compute_dtype=compute_dtype, sinusoidal=model.embedding_positions == "sinusoidal",
        )
        return whole.double() if compute_dtype == torch.float64 else whole  # weights are float32 under bfloat16 too


def _block(config: Config, layer: Layer, index: int) -> Block:
    model, mixes_channels = config.model, layer.channel_mixer is not None
    return Block(
        NORMS[model.norm](model.d_model, model.norm_eps),
        MIXERS[type(layer.mixer)](model, layer.mixer),
        NORMS[model.norm](model.d_model, model.norm_eps) if model.block == "serial" and mixes_channels else None,
        _channel_mixer(config, layer.channel_mixer, index) if layer.channel_mixer else None,
        ReZero() if model.residual == "rezero" else None,
    )


def _channel_mixer(config: Config, moe: FeedForwardConfig | MoEConfig, index: int) -> nn.Module:
    model = config.model
    if isinstance(moe, FeedForwardConfig):
        return FeedForward(model.d_model, moe.d_ff, moe.activation)
    own = {key: getattr(moe, key) for key in OWN_KEYS.get(moe.router, ())}
    capacity = Capacity(
        moe.capacity_factor, moe.eval_capacity_factor, moe.min_capacity, by_probability=moe.drop_by == "probability")
    router = ROUTERS[moe.router](
        model.d_model, moe.num_experts, moe.top_k, capacity=capacity, balance_over=moe.balance_over, jitter=moe.jitter,
        salt=(config.run.seed * model.num_layers + index) * 2, **own,
    )
    experts = Experts(
        moe.num_experts, model.d_model, moe.d_ff, moe.activation, dropout=moe.expert_dropout,
        salt=-1 - config.run.seed * model.num_layers - index,  # routers' salts are not negative
    )
    shared = None
    if moe.num_shared_experts:
        shared = FeedForward(model.d_model, moe.num_shared_experts * moe.d_ff, moe.activation)
    return MoELayer(router, experts, shared)
