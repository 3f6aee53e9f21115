"""HiPPO and the Legendre memory unit once more, straight from the papers, one sequence at a time with scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from moescale.config import parse_config
from moescale.model.build import build_model

SIZE, THETA, SEQ = 7, 11.0, 40


def mixer_of(kind: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    (name,) = kind
    config = parse_config({
        **kind, "model": {"d_model": 16, "num_layers": 1, "pattern": [{"mixer": name}]},
        "precision": {"compute": "float64"}, "data": {"tokenizer": "none.json"}}, "test")
    mixer = build_model(config, "cpu").blocks["0"].mixer
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return mixer, {name: tensor.detach().numpy() for name, tensor in mixer.named_parameters()}


def hippo(measure: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B as HiPPO prints them, for c' = -A c + B f (theorems 1 and 2, equations 1 and 2)."""
    a, b = np.zeros((SIZE, SIZE)), np.zeros(SIZE)
    for n in range(SIZE):
        b[n] = {"legt": (2 * n + 1) ** 0.5, "lagt": 1, "legs": (2 * n + 1) ** 0.5}[measure]
        for k in range(SIZE):
            root = ((2 * n + 1) * (2 * k + 1)) ** 0.5
            if measure == "legt":
                a[n, k] = root * (1 if k <= n else (-1) ** (n - k))
            elif measure == "lagt":
                a[n, k] = 1 if n >= k else 0
            else:
                a[n, k] = root if n > k else n + 1 if n == k else 0
    return a, b


def held(a: np.ndarray, b: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    discrete = scipy.signal.cont2discrete((a, b[:, None], np.eye(len(b)), np.zeros((len(b), 1))), step, "zoh")
    return discrete[0], discrete[1][:, 0]


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_hippo(measure: str) -> None:
    theta = None if measure == "legs" else THETA
    mixer, weights = mixer_of({"hippo": {"measure": measure, "channels": 2, "d_state": SIZE, "theta": theta}})
    x = np.random.default_rng(0).normal(size=(SEQ, 16))
    (a, b), memory, outs = hippo(measure), np.zeros((2, SIZE)), []
    for k, features in enumerate(x, 1):
        u = weights["u.weight"] @ features
        if measure == "legs" and k == 1:
            memory = u[:, None] * np.eye(SIZE)[0]  # one value held since the beginning: a constant
        else:
            # c' = (-A c + B f) / t is c' = -A c + B f in the logarithm of time.
            a_bar, b_bar = held(-a, b, np.log(k / (k - 1)) if measure == "legs" else 1 / THETA)
            memory = memory @ a_bar.T + u[:, None] * b_bar
        outs.append(weights["o.weight"] @ memory.flatten())
    ours = mixer(torch.from_numpy(x)[None], torch.arange(SEQ)[None])[0].detach().numpy()
    assert np.allclose(ours, outs, atol=1e-9)


@pytest.mark.parametrize("recurrent", [False, True])
def test_lmu(recurrent: bool) -> None:
    """Equations 1, 2, 6 and 7; without the arrows from units and memories, the form of Chilkuri and Eliasmith."""
    keys = {"memories": 2, "order": SIZE, "theta": THETA, "units": 5, "recurrent": recurrent}
    mixer, weights = mixer_of({"lmu": keys})
    a, b = np.zeros((SIZE, SIZE)), np.zeros(SIZE)
    for i in range(SIZE):
        b[i] = (2 * i + 1) * (-1) ** i
        for j in range(SIZE):
            a[i, j] = (2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1))
    a_bar, b_bar = held(a, b, 1 / THETA)
    x, memory, hidden, outs = np.random.default_rng(1).normal(size=(SEQ, 16)), np.zeros((2, SIZE)), np.zeros(5), []
    for features in x:
        u, drive = weights["e_x.weight"] @ features, weights["w_x.weight"] @ features
        if recurrent:
            u = u + weights["cell.e_h"] @ hidden + weights["cell.e_m"] @ memory.flatten()
            drive = drive + weights["cell.w_h"] @ hidden
        memory = memory @ a_bar.T + u[:, None] * b_bar
        hidden = np.tanh(drive + weights["cell.w_m" if recurrent else "w_m.weight"] @ memory.flatten())
        outs.append(weights["o.weight"] @ hidden)
    ours = mixer(torch.from_numpy(x)[None], torch.arange(SEQ)[None])[0].detach().numpy()
    assert np.allclose(ours, outs, atol=1e-9)
