"""Mamba and Mamba-2, once more: straight from the papers in float64, and with `transformers`' mixers' weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.config import parse_config
from moescale.mixers.mamba import Mamba
from moescale.mixers.mamba2 import Mamba2
from moescale.model.build import MIXERS, build_model
from moescale.model.initialize import initialize
from moescale.ops import ssd
from moescale.spec.mamba import MambaConfig
from moescale.spec.mamba2 import Mamba2Config
from moescale.spec.model import ModelConfig, describe
from tests.support.exact import check

D_MODEL, SEQ = 24, 40
POSITIONS = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in ((40,), (3, 1, 36))])


def make(**keys: bool | int) -> Mamba:
    torch.manual_seed(0)
    mixer = MIXERS[MambaConfig](ModelConfig(d_model=D_MODEL), MambaConfig(d_state=5, **keys))
    assert isinstance(mixer, Mamba)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return mixer


def by_the_paper(x: Tensor, positions: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Algorithm 2 and figure 3, one document and one position at a time; A by zero-order hold, B by Euler's rule."""
    w, rows = weights, []
    for row, at in zip(x, positions, strict=True):
        outs, rank, h = [], w["scan.step"].shape[1], torch.zeros(())
        for t in range(len(row)):
            if at[t] == 0:
                h, begins = torch.zeros_like(w["scan.a_log"]), t
            u = sum(w["conv.weight"][:, 3 - back] * (w["x.weight"] @ row[t - back])
                    for back in range(min(4, t - begins + 1))) + w["conv.bias"]
            u = u * torch.sigmoid(u)
            step, b, c = (w["select.weight"] @ u).split((rank, 5, 5))
            if "step_norm.weight" in w:  # Jamba
                step, b, c = (part / (part.square().mean() + 1e-5).sqrt() * w[f"{name}_norm.weight"]
                              for part, name in ((step, "step"), (b, "b"), (c, "c")))
            delta = torch.log(1 + torch.exp(w["scan.step"] @ step + w["scan.step_bias"]))
            h = torch.exp(-delta[:, None] * w["scan.a_log"].exp()) * h + (delta * u)[:, None] * b
            gate = w["gate.weight"] @ row[t]
            outs.append(w["out.weight"] @ ((h @ c + w["scan.d"] * u) * gate * torch.sigmoid(gate)))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("norms", [False, True], ids=["mamba", "jamba"])
def test_the_mixer_is_the_papers(norms: bool) -> None:
    mixer = make(inner_norms=norms)
    names, weights = zip(*mixer.named_parameters(), strict=True)

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (x, POSITIONS))

    check(ours, lambda x, *weights: by_the_paper(x, POSITIONS, dict(zip(names, weights, strict=True))),
          [torch.randn(2, SEQ, D_MODEL), *(weight.detach() for weight in weights)], [torch.float32] * (1 + len(names)))


def test_the_mixer_is_that_of_transformers() -> None:
    from transformers import MambaConfig as TheirConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer = make(dt_rank=3)
    theirs = MambaMixer(TheirConfig(hidden_size=D_MODEL, state_size=5, time_step_rank=3, num_hidden_layers=1), 0)
    pairs = {"conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias", "x_proj.weight": "select.weight",
             "dt_proj.weight": "scan.step", "dt_proj.bias": "scan.step_bias", "A_log": "scan.a_log", "D": "scan.d",
             "out_proj.weight": "out.weight"}
    their_own, own = dict(theirs.named_parameters()), dict(mixer.named_parameters())
    with torch.no_grad():
        their_own["in_proj.weight"].copy_(torch.cat((own["x.weight"], own["gate.weight"])))
        for name, ours in pairs.items():
            their_own[name].copy_(own[ours].view_as(their_own[name]))
    x = torch.randn(2, SEQ, D_MODEL, requires_grad=True)
    given = torch.randn(2, SEQ, D_MODEL)
    outs = []
    for module, arguments in ((mixer, (torch.arange(SEQ).expand(2, -1),)), (theirs, ())):
        out = module(x, *arguments)
        grads = torch.autograd.grad((out * given).sum(), [x, *module.parameters()])
        outs.append((out, grads[0], dict(zip(dict(module.named_parameters()), grads[1:], strict=True))))
    (out, grad, grads), (their_out, their_grad, their_grads) = outs
    grads["in"] = torch.cat((grads["x.weight"], grads["gate.weight"]))
    compared = [(out, their_out), (grad, their_grad), (grads["in"], their_grads["in_proj.weight"]),
                *((grads[ours], their_grads[name].view_as(grads[ours])) for name, ours in pairs.items())]
    assert len(compared) == 2 + len(their_own)
    for mine, their in compared:
        assert float((mine - their).detach().norm()) < 1e-5 * float(their.detach().norm())


def make2(**keys: int) -> Mamba2:
    torch.manual_seed(0)
    mixer = MIXERS[Mamba2Config](ModelConfig(d_model=D_MODEL), Mamba2Config(d_state=5, head_dim=6, **keys))
    assert isinstance(mixer, Mamba2)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return mixer


def mamba2_by_the_paper(x: Tensor, positions: Tensor, weights: dict[str, Tensor], groups: int) -> Tensor:
    """Listing 1's recurrence, one document and one position at a time, with the gated norm behind it."""
    w, rows = weights, []
    heads = len(w["scan.d"]) // groups
    for row, at in zip(x, positions, strict=True):
        outs, h = [], torch.zeros(())
        for t in range(len(row)):
            if at[t] == 0:
                h, begins = torch.zeros(groups * heads, 6, 5, dtype=x.dtype), t
            parts = []
            for conv, matrix in (("conv", "x"), ("select_conv", "select")):
                u = sum(w[f"{conv}.weight"][:, 3 - back] * (w[f"{matrix}.weight"] @ row[t - back])
                        for back in range(min(4, t - begins + 1))) + w[f"{conv}.bias"]
                parts.append(u * torch.sigmoid(u))
            u = parts[0].view(-1, 6)
            b, c = (each.view(groups, 5).repeat_interleave(heads, 0) for each in parts[1].chunk(2))
            delta = torch.log(1 + torch.exp(w["step.weight"] @ row[t] + w["scan.step_bias"]))
            h = torch.exp(-delta * w["scan.a_log"].exp())[:, None, None] * h + (
                delta[:, None, None] * u[:, :, None] * b[:, None, :])
            gate = w["gate.weight"] @ row[t]
            y = ((h * c[:, None]).sum(-1) + w["scan.d"][:, None] * u).flatten() * gate * torch.sigmoid(gate)
            y = y.view(groups, -1)
            y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten() * w["norm.weight"]
            outs.append(w["out.weight"] @ y)
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [1, 4])
def test_mamba2_is_the_papers(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "CHUNK", 16)  # the last one has 8 positions
    mixer = make2(num_groups=groups)
    names, weights = zip(*mixer.named_parameters(), strict=True)

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (x, POSITIONS))

    check(ours, lambda x, *weights: mamba2_by_the_paper(x, POSITIONS, dict(zip(names, weights, strict=True)), groups),
          [torch.randn(2, SEQ, D_MODEL), *(weight.detach() for weight in weights)], [torch.float32] * (1 + len(names)))


def test_mamba2_is_that_of_transformers() -> None:
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    mixer = make2(num_groups=2)
    theirs = Mamba2Mixer(TheirConfig(hidden_size=D_MODEL, state_size=5, num_heads=8, head_dim=6, n_groups=2,
                                     chunk_size=16, num_hidden_layers=1, layer_norm_epsilon=1e-5), 0)
    joined = {"in_proj.weight": ("gate.weight", "x.weight", "select.weight", "step.weight"),
              "conv1d.weight": ("conv.weight", "select_conv.weight"),
              "conv1d.bias": ("conv.bias", "select_conv.bias"), "dt_bias": ("scan.step_bias",),
              "A_log": ("scan.a_log",), "D": ("scan.d",), "norm.weight": ("norm.weight",),
              "out_proj.weight": ("out.weight",)}
    their_own, own = dict(theirs.named_parameters()), dict(mixer.named_parameters())
    assert their_own.keys() == joined.keys()
    with torch.no_grad():
        for name, parts in joined.items():
            their_own[name].copy_(torch.cat([own[part] for part in parts]).view_as(their_own[name]))
    x = torch.randn(2, SEQ, D_MODEL, requires_grad=True)
    given = torch.randn(2, SEQ, D_MODEL)
    out, their_out = mixer(x, torch.arange(SEQ).expand(2, -1)), theirs(x)
    grad, *grads = torch.autograd.grad((out * given).sum(), [x, *own.values()])
    their_grad, *their_grads = torch.autograd.grad((their_out * given).sum(), [x, *their_own.values()])
    by_name = dict(zip(own, grads, strict=True))
    compared = [(out, their_out), (grad, their_grad),
                *((torch.cat([by_name[part] for part in joined[name]]), each)
                  for name, each in zip(their_own, their_grads, strict=True))]
    for mine, their in compared:
        assert float((mine - their.view_as(mine)).detach().norm()) < 1e-5 * float(their.detach().norm())


def test_first_values_are_the_papers() -> None:
    config = parse_config({"model": {"d_model": 64, "num_layers": 1, "pattern": [{"mixer": "mamba"}]}}, "test")
    mixer = MIXERS[MambaConfig](config.model, config.mamba)
    initialize(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mixer": mixer})])}), describe(config), 3)
    scan = mixer.scan
    assert torch.equal(scan.a_log, torch.arange(1, 17).double().log().float().expand(128, 16))
    assert torch.equal(scan.d, torch.ones(128))
    steps = F.softplus(scan.step_bias).detach().log10()
    assert float(steps.min()) > -3.001
    assert float(steps.max()) < -0.999
    assert float(steps.mean()) == pytest.approx(-2, abs=0.15)
    assert 0.2 < float(scan.step.max()) < 0.5 + 1e-6  # dt_rank = 64 / 16
    kept = {weight.name[-1] for weight in describe(config).weights() if not weight.decays and "mixer" in weight.name}
    assert kept == {"a_log", "d", "step_bias", "bias"}


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_outputs_start_smaller_the_more_layers_there_are(kind: str) -> None:
    """Divided by the square root of their number, so that what all of them add does not grow with it."""
    weights = {}
    for layers in (1, 9):
        config = parse_config({"model": {"d_model": 64, "num_layers": layers, "pattern": [{"mixer": kind}]}}, "test")
        model = build_model(config, "cpu")
        initialize(model, describe(config), 3)
        weights[layers] = dict(model.named_parameters())
    for name, deep in weights[9].items():
        if name in weights[1]:
            expected = weights[1][name] / 3 if name.endswith("mixer.out.weight") else weights[1][name]
            torch.testing.assert_close(deep, expected)
    assert float(weights[1]["blocks.0.mixer.out.weight"].std()) == pytest.approx(0.02, rel=0.05)


def test_first_decays_of_heads_are_the_papers() -> None:
    config = parse_config({"model": {"d_model": 64, "num_layers": 1, "pattern": [{"mixer": "mamba2"}]},
                           "mamba2": {"head_dim": 1}}, "test")
    mixer = MIXERS[Mamba2Config](config.model, config.mamba2)
    initialize(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mixer": mixer})])}), describe(config), 3)
    decays = mixer.scan.a_log.detach().exp()  # uniform between 1 and 16
    assert 1 <= float(decays.min()) < 2.5
    assert 14.5 < float(decays.max()) <= 16
    assert float(decays.mean()) == pytest.approx(8.5, abs=1.5)
