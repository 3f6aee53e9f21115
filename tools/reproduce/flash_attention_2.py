"""FlashAttention-2: an unscaled output with one division per row, tiles above the diagonal left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from flash_attention import SlowMemory, tiled
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moescale.ops import attention_chunked
from moescale.ops.attention import attention

LENGTH, BLOCK, D_HEAD = 4096, 128, 64
TILES = LENGTH // BLOCK


class Counter(TorchDispatchMode):
    """Counts what our chunked attention computes: each operation on scores or outputs of one tile, as it is executed.

    tiles: maxima of scores. rescales: products with the factor by which a tile shrinks what was added up before, the
    sum of exponentials and that of values. divisions: of outputs. masked: tiles of whose scores some are hidden.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tiles = self.rescales = self.divisions = self.masked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.amax.default:
            self.tiles += 1
        elif func is aten.mul.Tensor:
            self.rescales += 1
        elif func is aten.div.Tensor and result.shape[-1] == D_HEAD:
            self.divisions += 1
        elif func is aten.masked_fill_.Scalar:
            self.masked += bool((result == -torch.inf).any())
        return result


@contextmanager
def tiles_of(size: int) -> Iterator[None]:
    """Let our chunked attention take square tiles of this size while the context lasts."""
    before, attention_chunked.CHUNK = attention_chunked.CHUNK, size
    try:
        yield
    finally:
        attention_chunked.CHUNK = before


def run(seed: int) -> Figures:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, LENGTH, 1, D_HEAD, generator=generator) for _ in range(3))
    q.requires_grad_()  # so that the log-sum-exp is kept for backward
    counter = Counter()
    with tiles_of(BLOCK), counter:
        out = attention(q, k, v, backend="chunked")
    log_sum = _saved_log_sum(out)
    query, key, value = (x.detach().view(LENGTH, D_HEAD) for x in (q, k, v))
    first, _ = tiled(query, key, value, 4 * D_HEAD * BLOCK, SlowMemory(), causal=True)
    scores = (query @ key.T) * D_HEAD**-0.5
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    exact = scores.masked_fill_(later, -torch.inf).logsumexp(-1)
    # The growth of the counts with the length, for the plot.
    lengths, counts = [512, 1024, 2048, LENGTH], []
    for length in lengths:
        with tiles_of(BLOCK), Counter() as fewer, torch.no_grad():
            attention(q[:, :length], k[:, :length], v[:, :length], backend="chunked")
        counts.append(fewer.tiles)
    return {
        "tiles": counter.tiles, "masked": counter.masked, "rescales": counter.rescales, "divisions": counter.divisions,
        "log-sum": float((log_sum - exact).abs().max()), "lengths": lengths, "counts": counts,
        "output": float((out.detach().view(LENGTH, D_HEAD) - first).abs().max()),
    }


def _saved_log_sum(out: Tensor) -> Tensor:
    """Take the log-sum-exp of each row that our attention kept for backward; all that it kept is linear in length."""
    assert out.grad_fn is not None
    saved: tuple[Tensor, ...] = out.grad_fn.saved_tensors  # type: ignore[attr-defined]
    assert all(tensor.numel() <= LENGTH * D_HEAD for tensor in saved)
    return saved[-1].view(LENGTH)


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    axes = figure.subplots()
    lengths = runs[0]["lengths"]
    axes.loglog(lengths, [(length / BLOCK) ** 2 for length in lengths], marker="o", color="tab:gray", label="all tiles")
    axes.loglog(lengths, runs[0]["counts"], marker="o", color="tab:blue", label="executed by ours, causal")
    axes.set(xlabel="positions", ylabel=f"tiles of {BLOCK} x {BLOCK}", title="tiles above the diagonal are left out")
    axes.legend()


REPRODUCTION = Reproduction(
    title="FlashAttention-2",
    paper="Dao, 2023",
    claim="fewer operations that are no matrix products (the output is divided once per row, the log-sum-exp alone is "
          "kept) and causal tiles left out (1.7 to 1.8 times faster): up to 73 % of an A100's peak, 1.7 to 3.0 times "
          "FlashAttention",
    miniature="our chunked attention, causal, 4096 positions, tiles of 128: its operations are counted as torch "
              "executes them, its output held to FlashAttention's algorithm 1, its log-sum-exp to torch's",
    run=run,
    plot=plot,
    criteria=(
        Criterion("tiles executed of 1024", lambda figures: figures["tiles"], equals=TILES * (TILES + 1) // 2),
        Criterion("tiles with hidden scores", lambda figures: figures["masked"], equals=TILES),
        Criterion("rescales, of sum and output once a tile", lambda figures: figures["rescales"],
                  equals=TILES * (TILES + 1)),
        Criterion("divisions of the output", lambda figures: figures["divisions"], equals=TILES),
        Criterion("error of the log-sum-exp", lambda figures: figures["log-sum"], at_most=1e-5),
        Criterion("difference to FlashAttention's output", lambda figures: figures["output"], at_most=1e-6),
    ),
    note="Speed needs a GPU: docs/performance.md has our kernel's beside the vendors'.",
)

if __name__ == "__main__":
    main(REPRODUCTION)
