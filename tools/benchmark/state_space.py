"""S4, S4D and LSSL by FFT beside the same systems position by position.

    python tools/benchmark/state_space.py [--threads 2] [--rounds 5]

Both ways give the same outputs, which is checked. "steps" is the mixer's own step of generation, forward; "loop" is
the plainest recurrence with discrete matrices, in float32, forward and backward by autograd. The loop is timed over
512 positions and multiplied. One thread is timed by the processor's clock, to which other programs add nothing;
several by the wall's. Time and memory by length: tools/benchmark/mixers.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moescale.config import parse_config
from moescale.mixers.state_space import StateSpace, Systems
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.ops.state_space import linear_system_reference
from moescale.spec.model import describe

KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "S4": ("s4", {}), "S4D": ("s4", {"form": "diagonal", "discretization": "zero_order_hold"}), "LSSL": ("lssl", {}),
}
BATCH, CHANNELS, D_STATE, LENGTH, LOOP = 4, 64, 64, 4096, 512


def systems_of(name: str) -> Systems:
    """Make the systems of a layer as a run begins with them."""
    kind, keys = KINDS[name]
    config = parse_config({
        "model": {"d_model": CHANNELS, "num_layers": 1, "pattern": [{"mixer": kind, "channel_mixer": "feed_forward"}]},
        kind: {"d_state": D_STATE, **keys}}, "benchmark")
    model = build_model(config, "cpu")
    initialize(model, describe(config), 0)
    mixer = model.blocks["0"].mixer
    assert isinstance(mixer, StateSpace)
    return mixer.systems


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, length, CHANNELS), torch.arange(length).expand(batch, -1)


def by_fft(systems: Systems, u: Tensor, positions: Tensor) -> Tensor:
    out: Tensor = systems(u, positions, None)[0]
    return out


@torch.no_grad()
def by_steps(systems: Systems, u: Tensor, positions: Tensor) -> Tensor:
    state, prepared, outs = systems.zeros(u), systems.prepare(), []
    for t in range(u.shape[1]):
        out, state = systems(u[:, t : t + 1], positions[:, t : t + 1], state, prepared)
        outs.append(out)
    return torch.cat(outs, 1)


def by_loop(systems: Systems, u: Tensor, positions: Tensor) -> Tensor:
    a, b, c = (x.to(torch.complex64 if x.is_complex() else torch.float32) for x in systems.system())
    out, _ = linear_system_reference(u, positions == 0, a, b, c, systems.zeros(u))
    return out + systems.d.unsqueeze(-1).view(CHANNELS, -1) * u.unsqueeze(3)


def seconds(run: Callable[[Systems, Tensor, Tensor], Tensor], systems: Systems, u: Tensor, positions: Tensor,
            backward: bool) -> float:
    """Time a forward pass, and the backward one where it is wanted."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    with torch.set_grad_enabled(backward):
        out = run(systems, u, positions)
    if backward:
        out.square().sum().backward()
    return clock() - began


def compare(name: str, rounds: int) -> list[str]:
    """Time all ways in alternation. Returns a row of the table."""
    systems = systems_of(name)
    u, positions = inputs(BATCH, LENGTH)
    short = u[:, :LOOP], positions[:, :LOOP]
    exact = by_fft(systems, *short).detach()
    for run in (by_steps, by_loop):
        torch.testing.assert_close(run(systems, *short).detach(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    times: dict[str, list[float]] = {"fft": [], "fft trained": [], "steps": [], "loop trained": []}
    for _ in range(rounds):
        times["fft"].append(seconds(by_fft, systems, u, positions, False))
        times["fft trained"].append(seconds(by_fft, systems, u, positions, True))
        times["steps"].append(seconds(by_steps, systems, *short, False) * LENGTH / LOOP)
        times["loop trained"].append(seconds(by_loop, systems, *short, True) * LENGTH / LOOP)
    fft, fft_trained, steps, loop = (1000 * statistics.median(each) for each in times.values())
    return [name, f"{fft:.0f}", f"{steps:.0f}", f"{steps / fft:.1f}", f"{fft_trained:.0f}", f"{loop:.0f}",
            f"{loop / fft_trained:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=110)
    table = Table("", "FFT, ms", "steps, ms", "ratio", "FFT trained, ms", "loop trained, ms", "ratio",
                  title=f"{BATCH} x {LENGTH:,} positions, {CHANNELS} channels of {D_STATE} states")
    for name in KINDS:
        table.add_row(*compare(name, arguments.rounds))
    console.print(table)


if __name__ == "__main__":
    main()
