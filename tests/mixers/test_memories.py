"""HiPPO's and the LMU's layers: a state, a description and padding are what the full forward is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.config import Config, ConfigError, parse_config
from moescale.mixers.base import Mixer
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.spec.model import describe

KINDS: dict[str, dict[str, Any]] = {
    **{measure: {"hippo": {"measure": measure, "channels": 3, "d_state": 9, "theta": theta}}
       for measure, theta in (("legs", None), ("legt", 7.0), ("lagt", 7.0), ("fourier", 7.0))},
    "lmu": {"lmu": {"memories": 3, "order": 6, "theta": 7, "units": 10}},
    "the paper's lmu": {"lmu": {"memories": 3, "order": 6, "theta": 7, "units": 10, "recurrent": True}},
}
POSITIONS = torch.stack([torch.cat([torch.arange(size) for size in sizes])
                         for sizes in ((4, 8, 3, 35), (40, 1, 9), (50,))])


def make(kind: dict[str, Any], **parallel: int) -> Config:
    (mixer,) = kind
    return parse_config({
        **kind, "model": {"d_model": 16, "num_layers": 1, "pattern": [{"mixer": mixer}]},
        "precision": {"compute": "float64"}, "parallel": parallel, "data": {"tokenizer": "none.json"}}, "test")


def make_mixer(config: Config) -> Mixer[Any]:
    model = build_model(config, "cpu")
    initialize(model, describe(config), 0)
    for parameter in model.parameters():
        if not parameter.count_nonzero():  # as the encoder of the paper's memories begins
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(0))
    return model.blocks["0"].mixer


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_state_goes_on_as_if_never_cut(kind: dict[str, Any]) -> None:
    """Prompts, single steps and further parts, over documents that begin within and between them."""
    mixer, x = make_mixer(make(kind)), torch.randn(3, 50, 16, dtype=torch.float64)
    whole = mixer(x, POSITIONS)
    state, parts = mixer.new_state(3, 50), []
    with torch.no_grad():
        for first, last in pairwise([0, 9, 10, 11, 12, 13, 33, 40, 41, 42, 50]):
            parts.append(mixer(x[:, first:last], POSITIONS[:, first:last], state))
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
        for row, first, last in ((0, 12, 15), (1, 40, 41), (2, 0, 50)):  # each document alone
            alone = mixer(x[row : row + 1, first:last], POSITIONS[row : row + 1, first:last])
            torch.testing.assert_close(alone[0], whole[row, first:last], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_description_is_its_layer(kind: dict[str, Any]) -> None:
    config = make(kind)
    mixer, described = make_mixer(config), config.layers[0].mixer
    weights = {".".join(weight.name): weight.shape for weight in described.weights(16, "normal")}
    assert weights == {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()}
    state = mixer.new_state(5, 50)
    assert state.num_bytes() == described.state_bytes(16, 5, 50, 8)
    state.select(torch.tensor([2, 0]))
    assert state.num_bytes() == described.state_bytes(16, 2, 50, 8)
    small = described.shrink(SMALL)
    assert small.shares(16).keys() == described.shares(16).keys()
    assert all(size % 4 == 0 for size in small.shares(16).values())


SMALL: Any = type("Small", (), {"tps": (2, 4), "eps": (1,), "etps": (1,), "seq_len": 256, "small_seq_len": 32})()


def test_gradients_reach_every_weight() -> None:
    for kind in KINDS.values():
        mixer = make_mixer(make(kind))
        x = torch.randn(3, 50, 16, dtype=torch.float64, requires_grad=True)
        mixer(x, POSITIONS).square().sum().backward()
        grads: list[Tensor | None] = [x.grad, *(parameter.grad for parameter in mixer.parameters())]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leave it out, or use hippo.measure=legt"):
        make({"hippo": {"theta": 3.0}})
    with pytest.raises(ConfigError, match=r"write e.g. 256"):
        make({"hippo": {"measure": "legt"}})
    with pytest.raises(ConfigError, match="use 65"):
        make({"hippo": {"measure": "fourier", "theta": 8.0, "d_state": 64}})
    with pytest.raises(ConfigError, match=r"use parallel.cp=1, or lmu.recurrent=false"):
        make({"lmu": {"recurrent": True}}, cp=2).for_world(2)
    with pytest.raises(ConfigError, match=r"must divide hippo.channels=3"):
        make({"hippo": {"channels": 3}}, tp=2).for_world(2)
    with pytest.raises(ConfigError, match=r"dp_shard x cp=2 must divide the 15 memories of the mixers' w_m"):
        make({"lmu": {"memories": 3, "order": 5}}, tp=2).for_world(4)
