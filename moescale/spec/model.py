"""A model: its keys, the kinds of its layers, and all its weights by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from moescale.errors import ConfigError, any_of, check_width, refuse
from moescale.spec.attention import AttentionConfig
from moescale.spec.feed_forward import FeedForwardConfig
from moescale.spec.group import Group
from moescale.spec.hippo import HippoConfig
from moescale.spec.linear_attention import LinearAttentionConfig
from moescale.spec.lmu import LmuConfig
from moescale.spec.lssl import LsslConfig
from moescale.spec.mamba import MambaConfig
from moescale.spec.mamba2 import Mamba2Config
from moescale.spec.mixer import MixerConfig
from moescale.spec.moe import MAY_DIFFER, MoEConfig
from moescale.spec.s4 import S4Config
from moescale.spec.weights import Init, Weight, below, initial, norm

MIXERS: dict[str, type[MixerConfig]] = {
    "attention": AttentionConfig,
    "hippo": HippoConfig,
    "lmu": LmuConfig,
    "linear_attention": LinearAttentionConfig,
    "mamba": MambaConfig,
    "lssl": LsslConfig,
    "s4": S4Config,
    "mamba2": Mamba2Config,
}
"""The kinds of mixers: names of `mixer`, of groups of a run, and of the keys of an entry of `model.pattern`."""
KINDS = (*MIXERS, "feed_forward", "moe")  # of mixers and of channel mixers


class LayerConfig(Group):
    """One entry of `model.pattern`: what mixes tokens, what mixes features."""

    mixer: Literal["attention", "hippo", "lmu", "linear_attention", "mamba", "lssl", "s4", "mamba2"] = "attention"
    """What mixes the positions of a sequence."""
    channel_mixer: Literal["feed_forward", "moe", "none"] = "moe"
    """What mixes the features of a position: a feed-forward, a mixture of experts, or nothing more (Mamba)."""
    attention: dict[str, Any] = Field(default_factory=dict)
    """Keys of attention that are others in these layers, e.g. {window: 512}."""
    hippo: dict[str, Any] = Field(default_factory=dict)
    """Keys of HiPPO's memories that are others in these layers, e.g. {measure: legt, theta: 64}."""
    lmu: dict[str, Any] = Field(default_factory=dict)
    """Keys of Legendre memory units that are others in these layers, e.g. {theta: 64}."""
    linear_attention: dict[str, Any] = Field(default_factory=dict)
    """Keys of linear attention that are others in these layers."""
    mamba: dict[str, Any] = Field(default_factory=dict)
    """Keys of Mamba that are others in these layers, e.g. {d_state: 64}."""
    lssl: dict[str, Any] = Field(default_factory=dict)
    """Keys of LSSL that are others in these layers, e.g. {d_state: 128}."""
    s4: dict[str, Any] = Field(default_factory=dict)
    """Keys of S4 that are others in these layers, e.g. {form: diagonal}."""
    mamba2: dict[str, Any] = Field(default_factory=dict)
    """Keys of Mamba-2 that are others in these layers, e.g. {head_dim: 32}."""
    feed_forward: dict[str, Any] = Field(default_factory=dict)
    """Keys of dense feed-forwards that are others in these layers."""
    moe: dict[str, Any] = Field(default_factory=dict)
    """Keys of mixtures that are others in these layers, e.g. {d_ff: 1024}."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind in KINDS:
            keys = getattr(self, kind)
            refuse(bool(keys) and kind not in (self.mixer, self.channel_mixer),
                   f"model.pattern: an entry has keys of {kind}, but mixer={self.mixer} and "
                   f"channel_mixer={self.channel_mixer}: leave out {kind}")
            for key in keys:
                refuse(kind == "moe" and key not in MAY_DIFFER,
                       f"model.pattern: moe.{key} is the same in all layers: write it in the group moe; "
                       f"{any_of(MAY_DIFFER)} may differ")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the keys of a kind only where there are some."""
        return {key: value for key, value in handler(self).items() if value != {}}


class ModelConfig(Group):
    vocab_size: int = Field(384, ge=2)
    """Rows of the embedding and the head: at least as many as the tokenizer has tokens."""
    d_model: int = Field(256, ge=8)
    """Features of a position between the layers."""
    num_layers: int = Field(4, ge=1, le=10_000)
    """Layers, each with one mixer and one channel mixer."""
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    """How features are normalized before each mixer and before the head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in a norm, so that nothing is divided by zero."""
    block: Literal["serial", "parallel"] = "serial"
    """`serial` has a norm before each mixer; `parallel` one norm for both, side by side (PaLM)."""
    residual: Literal["plain", "rezero"] = "plain"
    """How features and what a mixer gives come together: added, or first times a weight that is 0 at first (ReZero)."""
    embedding_positions: Literal["none", "sinusoidal"] = "none"
    """What is added to the embedding of a token: sines of its position in the document, where mixers know none."""
    tied_embeddings: bool = False
    """Whether the head's weight is the embedding's."""
    scale_logits: bool = False
    """Whether logits are divided by sqrt(d_model), as T5 and PaLM do with tied embeddings."""
    init: Literal["normal", "fan_in", "switch"] = "normal"
    """Deviation of the first weights: 0.02; 1/sqrt(fan in) (PaLM); a truncated one (Switch)."""
    z_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the squared log-normalizer of the output softmax in the loss (PaLM: 1e-4)."""
    pattern: tuple[LayerConfig, ...] = (LayerConfig(),)
    """The kinds of layers, repeated over num_layers."""

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The pattern tiled over all layers."""
        return tuple(self.pattern[index % len(self.pattern)] for index in range(self.num_layers))

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_width("model.d_model", self.d_model)
        refuse(self.residual == "rezero" and self.norm != "none",
               f"model.residual=rezero takes the place of model.norm={self.norm}: write model.norm=none")
        refuse(self.residual == "rezero" and self.block == "parallel",
               "model.block=parallel shares one norm, and model.residual=rezero has none: write model.block=serial")
        refuse(not self.pattern, "model.pattern is empty: write at least one layer, e.g. [{channel_mixer: moe}]")
        return self


Entry = TypeVar("Entry")


def shortest_pattern(layers: Sequence[Entry]) -> Sequence[Entry]:
    """Find the shortest pattern that, tiled, gives these layers."""
    return next(layers[:size] for size in range(1, len(layers) + 1)
                if all(layer == layers[index % size] for index, layer in enumerate(layers)))


Kind = TypeVar("Kind", bound=Group)


def with_changes(kind: Kind, changes: dict[str, Any], where: str) -> Kind:
    """Change some keys of a kind of layer. Raises ConfigError that names `where` they are written."""
    if not changes:
        return kind
    try:
        return type(kind).model_validate({**kind.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Layer:
    """One block of a model: the keys of its mixer and of its channel mixer."""

    mixer: MixerConfig
    channel_mixer: FeedForwardConfig | MoEConfig | None


class Described(Protocol):
    """What a description needs of a run's configuration."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def layers(self) -> tuple[Layer, ...]: ...


@dataclass(frozen=True)
class ModelSpec:
    """A model described: `describe` makes it."""

    model: ModelConfig
    layers: tuple[Layer, ...]

    def layer_weights(self, index: int) -> tuple[Weight, ...]:
        """Describe the weights of one layer, named from its block on."""
        model, layer = self.model, self.layers[index]
        alpha = Weight(("residual", "alpha"), (1,), ("weight",), None, "shared", Init("zeros"), decays=False)
        residual = (alpha,) if model.residual == "rezero" else ()
        mixer = (*residual, *self._norm("mixer_norm"), *below("mixer", layer.mixer.weights(model.d_model, model.init)))
        if layer.channel_mixer is None:
            return mixer
        channel_norm = () if model.block == "parallel" else self._norm("channel_norm")
        channel_mixer = layer.channel_mixer.weights(model.d_model, model.init)
        return (*mixer, *channel_norm, *below("channel_mixer", channel_mixer))

    def weights(self) -> tuple[Weight, ...]:
        """Describe all weights, each by its full name; a tied embedding, which is the head too, once."""
        model = self.model
        first = Init("normal", 0.02 if model.init == "normal" else 1.0)
        embedding = replace(self._rows("embedding", first), decays=False)
        blocks = [weight for index in range(len(self.layers))
                  for weight in below("blocks", below(str(index), self.layer_weights(index)))]
        head = () if model.tied_embeddings else (self._rows("head", initial(model.init, model.d_model)),)
        return (embedding, *blocks, *self._norm("norm"), *head)

    def _norm(self, name: str) -> tuple[Weight, ...]:
        """Describe the scale of a norm, where there are norms."""
        return () if self.model.norm == "none" else (norm(name, self.model.d_model),)

    def _rows(self, name: str, init: Init) -> Weight:
        """Describe a matrix with a row for each token of the vocabulary."""
        shape = self.model.vocab_size, self.model.d_model
        return Weight((name, "weight"), shape, ("vocab", "d_model"), "vocab", "dense", init)


def describe(config: Described) -> ModelSpec:
    """Describe the model of a run."""
    return ModelSpec(config.model, config.layers)
