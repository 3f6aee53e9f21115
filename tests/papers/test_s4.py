"""S4, S4D and LSSL as mixers against their papers' recurrences, written once more, state by state; in both modes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from moescale.config import parse_config
from moescale.mixers.state_space import StateSpace
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.spec.model import describe

D_STATE, SEQ = 8, 40
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "S4": ("s4", {}),
    "S4D-Lin": ("s4", {"form": "diagonal", "initialization": "lin", "discretization": "zero_order_hold"}),
    "S4D-Inv": ("s4", {"form": "diagonal", "initialization": "inv", "output": "linear"}),
    "S4D-LegS": ("s4", {"form": "diagonal"}),
    "S4D-Real": ("s4", {"form": "diagonal", "initialization": "real", "discretization": "zero_order_hold"}),
    "LSSL": ("lssl", {"outputs": 3}),
    "LSSL, backward": ("lssl", {"alpha": 1.0}),
}


def mixer_of(kind: str, keys: dict[str, Any], dtype: torch.dtype) -> StateSpace:
    config = parse_config({
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 40, "pattern": [{"mixer": kind}]},
        kind: {"d_state": D_STATE, "step_min": 0.01, "step_max": 0.3, **keys}, "moe": {"num_experts": 4, "d_ff": 8},
        "data": {"tokenizer": "none.json"}}, "test")
    model = build_model(config, "cpu")
    initialize(model, describe(config), 3)
    mixer = model.blocks["0"].mixer.to(dtype)
    assert isinstance(mixer, StateSpace)
    return mixer


def eigenvalues(name: str) -> np.ndarray:
    """S4D's tables (Gu et al., 2022, section 4), for N states of which half are kept."""
    n, count = np.arange(D_STATE // 2), D_STATE
    return {"lin": -0.5 + 1j * math.pi * n, "inv": -0.5 + 1j * count / math.pi * (count / (2 * n + 1) - 1),
            "real": -(n + 1) + 0j}[name]


def legs() -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS (S4, equation 2)."""
    a = np.zeros((D_STATE, D_STATE))
    for n in range(D_STATE):
        for k in range(n + 1):
            a[n, k] = -(n + 1) if n == k else -math.sqrt((2 * n + 1) * (2 * k + 1))
    return a, np.sqrt(2 * np.arange(D_STATE) + 1)


def run(kind: str, keys: dict[str, Any], weights: dict[str, np.ndarray], x: np.ndarray, starts: set[int]) -> np.ndarray:
    """Compute the mixer on one sequence [seq, d_model]. starts: of documents."""
    channels, outputs = x.shape[1], keys.get("outputs", 1)
    y = np.zeros((*x.shape, outputs))
    for channel in range(channels):
        step = math.exp(weights["systems.log_step"][channel])
        if kind == "lssl":
            (a, b), c = legs(), weights["systems.c"][channel]
            alpha = keys.get("alpha", 0.5)
        else:
            names = [name for name in ("b", "c", "p") if f"systems.{name}" in weights]
            parts = {name: weights[f"systems.{name}"][channel] for name in names}
            halves = {name: part[:, 0] + 1j * part[:, 1] for name, part in parts.items()}
            full = {name: np.concatenate((half, half.conj())) for name, half in halves.items()}
            values = -np.exp(weights["systems.log_decay"][channel]) + 1j * weights["systems.frequency"][channel]
            if keys.get("initialization", "legs") != "legs":
                np.testing.assert_allclose(values, eigenvalues(keys["initialization"]), rtol=1e-5)
            a = np.diag(np.concatenate((values, values.conj())))
            if "p" in full:
                a = a - np.outer(full["p"], full["p"].conj())
                np.testing.assert_allclose(np.poly(a).real, np.poly(legs()[0]), rtol=1e-3)
            b, c, alpha = full["b"], full["c"][None], 0.5
        identity = np.eye(D_STATE)
        if keys.get("discretization") == "zero_order_hold":
            a_bar = np.diag(np.exp(step * np.diag(a)))
            b_bar = (np.diag(a_bar) - 1) / np.diag(a) * b
        else:  # LSSL, equation 3
            inverse = np.linalg.inv(identity - alpha * step * a)
            a_bar, b_bar = inverse @ (identity + (1 - alpha) * step * a), step * inverse @ b
        state = np.zeros(D_STATE, dtype=a_bar.dtype)
        for t in range(len(x)):
            state = a_bar @ (0 * state if t in starts else state) + b_bar * x[t, channel]
            y[t, channel] = (c @ state).real + weights["systems.d"][channel].reshape(-1) * x[t, channel]
    y = y.reshape(len(x), -1)
    active = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    mixed = active @ weights["out.weight"].T
    if kind == "s4" and keys.get("output", "glu") == "glu":
        value, gate = np.split(mixed, 2, 1)
        mixed = value / (1 + np.exp(-gate))
    return mixed


@pytest.mark.parametrize(("kind", "keys"), CASES.values(), ids=CASES)
def test_a_mixer_is_its_paper(kind: str, keys: dict[str, Any]) -> None:
    mixer = mixer_of(kind, keys, torch.float64)
    weights = {name: parameter.detach().numpy() for name, parameter in mixer.named_parameters()}
    torch.manual_seed(0)
    x, positions = torch.randn(2, SEQ, 8, dtype=torch.float64), torch.arange(SEQ).repeat(2, 1)
    positions[1, 17:] -= 17
    expected = [run(kind, keys, weights, row.numpy(), starts) for row, starts in zip(x, ({0}, {0, 17}), strict=True)]
    np.testing.assert_allclose(mixer(x, positions).detach(), np.stack(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "keys"), CASES.values(), ids=CASES)
def test_generation_equals_teacher_forcing(kind: str, keys: dict[str, Any]) -> None:
    """Over 2,000 positions in float32: a prompt, then pieces and single positions, across documents."""
    mixer, seq = mixer_of(kind, keys, torch.float32), 2000
    torch.manual_seed(0)
    x, positions = torch.randn(2, seq, 8), torch.arange(seq).repeat(2, 1)
    positions[0, 1990:] -= 1990
    with torch.no_grad():
        whole = mixer(x, positions)
        state, outs = mixer.new_state(2, seq), []
        for begin, end in ((0, 700), (700, 1950), *((t, t + 1) for t in range(1950, seq))):
            outs.append(mixer(x[:, begin:end], positions[:, begin:end], state))
    assert (torch.cat(outs, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert state.num_bytes() == 2 * 8 * D_STATE * 4
