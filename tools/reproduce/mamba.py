"""Mamba: steps, inputs and outputs that the tokens choose find what a linear system that never changes cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor, nn
from training import fit

from moescale.config import parse_config
from moescale.layers.linear import Embedding, Linear
from moescale.layers.norm import RMSNorm
from moescale.mixers.mamba import Mamba
from moescale.mixers.recurrent_state import RecurrentState
from moescale.model.initialize import initialize
from moescale.ops.convolution import causal_convolution
from moescale.ops.scan import selective_scan, selective_scan_reference
from moescale.spec.model import describe

SYMBOLS, D_MODEL, LAYERS, LENGTH, BATCH, STEPS, RATE = 16, 32, 2, 32, 128, 600, 3e-3
LENGTHS = (32, 64, 128, 256, 512, 1024)
RUN = parse_config({"model": {"vocab_size": SYMBOLS + 1, "d_model": D_MODEL, "num_layers": LAYERS, "init": "fan_in",
                              "pattern": [{"mixer": "mamba", "channel_mixer": "feed_forward"}]},
                    "data": {"tokenizer": "none.json"}}, "mamba")


class FixedMamba(Mamba):
    """Mamba's block without selection: steps, inputs and outputs are parameters of each channel (S4D-Real by FFT)."""

    def forward(self, x: Tensor, positions: Tensor, state: RecurrentState | None = None) -> Tensor:
        u = F.silu(self.conv(self.x(x), positions, x.new_zeros(len(x), self.width - 1, self.channels)))
        delta, a = F.softplus(self.scan.step_bias), -self.scan.a_log.exp()
        age = torch.arange(x.shape[1])
        decays = (delta.view(-1, 1, 1) * a.unsqueeze(-1) * age).exp()  # [channels, d_state, seq]
        kernel = (decays * (self.taken * self.read * delta.unsqueeze(1)).unsqueeze(-1)).sum(1)
        y = causal_convolution(u, kernel.unsqueeze(1)).squeeze(-1) + self.scan.d * u
        return self.out(y * F.silu(self.gate(x)))

    def fix(self) -> None:
        """Make inputs and outputs parameters: once the others have their first values."""
        self.taken = nn.Parameter(torch.ones_like(self.scan.a_log))
        self.read = nn.Parameter(torch.randn_like(self.scan.a_log))


class Block(nn.Module):
    """A mixer behind a norm, beside a residual."""

    def __init__(self, kind: type[Mamba]) -> None:
        super().__init__()
        keys = RUN.mamba
        self.mixer_norm = RMSNorm(D_MODEL, 1e-5)
        self.mixer = kind(D_MODEL, keys.d_inner(D_MODEL), d_state=keys.d_state, d_conv=keys.d_conv,
                          rank=keys.rank(D_MODEL))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.mixer(self.mixer_norm(x), positions)


class Model(nn.Module):
    """Blocks of a norm and a mixer, and nothing else between embedding and head."""

    def __init__(self, mixer: type[Mamba], seed: int) -> None:
        super().__init__()
        self.embedding, self.head = Embedding(SYMBOLS + 1, D_MODEL), Linear(D_MODEL, SYMBOLS + 1)
        self.blocks = nn.ModuleList(Block(mixer) for _ in range(LAYERS))
        self.norm = RMSNorm(D_MODEL, 1e-5)
        initialize(self, describe(RUN), seed)
        for module in self.modules():
            if isinstance(module, FixedMamba):
                module.fix()

    def forward(self, tokens: Tensor) -> Tensor:
        """Score what follows the last token. tokens: [batch, seq]. Returns [batch, symbols]."""
        x, positions = self.embedding(tokens, torch.float32), torch.arange(tokens.shape[1]).expand_as(tokens)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(self.norm(x[:, -1]))


def induction(length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw symbols, among them a special one somewhere and at the end. Returns them, and what followed the first."""
    tokens = torch.randint(SYMBOLS, (batch, length), generator=generator)
    place = torch.randint(length - 2, (batch, 1), generator=generator)
    tokens.scatter_(1, place, SYMBOLS)
    tokens[:, -1] = SYMBOLS
    return tokens, tokens.gather(1, place + 1).squeeze(1)


def learn(mixer: type[Mamba], seed: int) -> list[float]:
    """Train on short sequences. Returns the share of right answers at each of LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(mixer, seed)

    def losses() -> Iterator[Tensor]:
        for _ in range(STEPS):
            tokens, wanted = induction(LENGTH, BATCH, generator)
            yield F.cross_entropy(model(tokens), wanted)

    fit(torch.optim.Adam(model.parameters()), losses(), clip_norm=1.0,
        rate=lambda step: RATE if step < 0.85 * STEPS else RATE / 10)
    shares = []
    with torch.no_grad():
        for length in LENGTHS:
            tokens, wanted = induction(length, 128, generator)
            shares.append(float((model(tokens).argmax(-1) == wanted).float().mean()))
    return shares


def scan_error(seed: int) -> float:
    """Measure how far the scan is from position by position, over 1,024 positions in float32."""
    generator = torch.Generator().manual_seed(seed)
    u, delta, b, c = (torch.randn(1, 1024, size, generator=generator) for size in (64, 64, 16, 16))
    inputs = (u, F.softplus(delta - 4), -torch.arange(1.0, 17).expand(64, 16), b, c, torch.ones(64))
    return float((selective_scan(*inputs)[0] - selective_scan_reference(*inputs)[0]).abs().max())


def run(seed: int) -> Figures:
    return {"selective": learn(Mamba, seed), "fixed": learn(FixedMamba, seed), "scan error": scan_error(seed)}


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    axes = figure.subplots()
    for kind, color in (("selective", "tab:orange"), ("fixed", "tab:gray")):
        for index, figures in enumerate(runs):
            axes.plot(LENGTHS, figures[kind], color=color, marker="o", label=kind if index == 0 else None)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length (trained at 32)", ylabel="right answers", title="induction heads, three seeds")
    axes.legend()


def at(kind: str, length: int) -> Any:
    return lambda figures: figures[kind][LENGTHS.index(length)]


REPRODUCTION = Reproduction(
    title="Mamba",
    paper="Gu and Dao, 2023",
    claim="induction heads: trained at length 256, a selective model answers up to 2^20, 4,000 times as long, where "
          "attention fails from twice the length on (table 2; from the text, secondary source)",
    miniature="16 symbols and a special one, once somewhere and once at the end; two blocks of 32 features, trained at "
              "length 32 for 600 steps of 128 sequences, Adam 3e-3; the same block with steps, inputs and outputs as "
              "parameters of each channel (S4D-Real by FFT) beside it",
    run=run,
    plot=plot,
    criteria=(
        Criterion("right answers of the selective one at 256", at("selective", 256), at_least=0.95),
        Criterion("right answers of the fixed one at 32, as trained", at("fixed", 32), at_least=0.9),
        Criterion("right answers of the fixed one at 128", at("fixed", 128), at_most=0.6),
        Criterion("right answers of the fixed one at 256", at("fixed", 256), at_most=0.4),
        Criterion("scan against position by position, largest difference", lambda figures: figures["scan error"],
                  at_most=1e-5),
    ),
    note="A first try with 64 sequences a step was short: 0.914 at 256 on seeds 0, 1 and 2 (median). Twice as many "
         "were then chosen on seeds 100 and 101 (1.000 and 0.977), and seeds 0, 1 and 2 gave 0.969, 0.805 and 0.992, "
         "a pass. Since then output matrices start divided by the square root of the depth, as the paper has it. What "
         "stands here was judged again with that, and its median is one answer of 128 below the bound: the settings "
         "lie at its edge, and seeds differ by more than what is missing.",
)

if __name__ == "__main__":
    main(REPRODUCTION)
