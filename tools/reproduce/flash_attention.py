"""FlashAttention: exact attention by tiles, with fewer accesses to slow memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor, nn
from training import Trainer, text_batches, train

from moescale.mixers.attention import Attention
from moescale.ops.attention import attention
from moescale.ops.attention_pattern import Visibility

LENGTH, D_HEAD = 4096, 64
SRAM = (25_600, 51_200)  # elements of fast memory
STEPS = 100


class SlowMemory:
    """Counts the elements that are loaded from slow memory and stored to it."""

    def __init__(self) -> None:
        self.elements = 0

    def load(self, x: Tensor) -> Tensor:
        self.elements += x.numel()
        return x.clone()

    def store(self, x: Tensor, to: Tensor) -> None:
        self.elements += x.numel()
        to.copy_(x)


def standard(q: Tensor, k: Tensor, v: Tensor, memory: SlowMemory) -> Tensor:
    """Compute softmax(q k' / sqrt(d)) v as the paper's algorithm 0 does: scores and probabilities go to slow memory."""
    scores, out = q.new_empty(len(q), len(k)), torch.empty_like(q)
    memory.store(memory.load(q) @ memory.load(k).T * q.shape[1] ** -0.5, scores)
    memory.store(memory.load(scores).softmax(-1), scores)
    memory.store(memory.load(scores) @ memory.load(v), out)
    return out


def tiled(
    q: Tensor, k: Tensor, v: Tensor, sram: int, memory: SlowMemory, causal: bool = False, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the same tile by tile (algorithm 1 and 2): output, sums and maxima of rows are kept in slow memory.

    q, k, v: [n, d]. sram: elements that fast memory holds. seen: [n] bool, keys that any query may see.
    Returns the output [n, d], zero for a query that sees nothing, and the log-sum-exp of each row [n].
    """
    (n, d), scale = q.shape, q.shape[1] ** -0.5
    columns = math.ceil(sram / (4 * d))
    rows = min(columns, d)
    out, top, total = torch.zeros_like(q), q.new_full((n, 1), -math.inf), q.new_zeros(n, 1)
    for j in range(0, n, columns):
        keys = slice(j, min(j + columns, n))
        key, value = memory.load(k[keys]), memory.load(v[keys])
        for i in range(0, n, rows):
            queries = slice(i, min(i + rows, n))
            if causal and j > queries.stop - 1:
                continue
            query, old, m, total_old = (memory.load(x[queries]) for x in (q, out, top, total))
            scores = _masked(query @ key.T * scale, queries, keys, causal, seen)
            highest = scores.amax(1, keepdim=True)
            m_new = torch.maximum(m, highest)
            base = torch.where(m_new == -math.inf, 0.0, m_new)  # -inf less itself is no number
            probs, shrink = (scores - base).exp(), (m - base).exp()
            total_new = shrink * total_old + probs.sum(1, keepdim=True)
            new = (total_old * shrink * old + probs @ value) / total_new.clamp(min=torch.finfo(q.dtype).tiny)
            for x, to in ((new, out), (m_new, top), (total_new, total)):
                memory.store(x, to[queries])
    return out, (top + total.log()).squeeze(1)


def tiled_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, grad: Tensor, block: int, causal: bool,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v with probabilities that are computed again per tile (algorithm 4)."""
    n, scale = len(q), q.shape[1] ** -0.5
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * out).sum(1, keepdim=True)
    for j in range(0, n, block):
        for i in range(0, n, block):
            keys, queries = slice(j, min(j + block, n)), slice(i, min(i + block, n))
            scores = _masked(q[queries] @ k[keys].T * scale, queries, keys, causal, seen)
            probs = torch.where(scores == -math.inf, 0.0, (scores - log_sum[queries, None]).exp())
            grad_v[keys] += probs.T @ grad[queries]
            grad_scores = probs * (grad[queries] @ v[keys].T - delta[queries]) * scale
            grad_q[queries] += grad_scores @ k[keys]
            grad_k[keys] += grad_scores.T @ q[queries]
    return grad_q, grad_k, grad_v


def _masked(scores: Tensor, queries: slice, keys: slice, causal: bool, seen: Tensor | None) -> Tensor:
    if causal:
        later = torch.arange(keys.start, keys.stop) > torch.arange(queries.start, queries.stop).unsqueeze(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if seen is None else scores.masked_fill(~seen[keys], -math.inf)


def run(seed: int) -> Figures:
    figures: Figures = {**errors(seed), **traffic(seed)}
    for name in ("sdpa", "chunked"):
        trainer = Trainer({"model": {"d_model": 64, "num_layers": 2, "pattern": [{"channel_mixer": "feed_forward"}]},
                           "feed_forward": {"d_ff": 256, "activation": "gelu"}, "optim": {"lr": 2e-3},
                           "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}}, seed)
        for mixer in trainer.engine.model.modules():
            if isinstance(mixer, Attention):
                mixer.core = Core(name)
        figures[f"loss {name}"] = train(trainer, text_batches(seed, 8, 600), STEPS)
    return figures


class Core(nn.Module):
    """Attends with one backend of ours. name: as in `ops.attention`"""

    def __init__(self, name: Any) -> None:
        super().__init__()
        self.name = name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, visibility: Visibility, **others: Any) -> Tensor:
        return attention(q, k, v, backend=self.name, **vars(visibility), **others)


def errors(seed: int) -> Figures:
    """Compare the tiles above and ours with torch's kernel: 300 positions, tiles of 64, causal and not.

    With `nothing seen` the first keys are masked, so that the first queries of a causal pattern see nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = 300, 32
    forward, backward, ours = [0.0], [0.0], [0.0]
    for causal in (False, True):
        for seen in (None, torch.arange(n) >= 40):
            q, k, v, grad = (torch.randn(n, d, generator=generator) for _ in range(4))
            out, log_sum = tiled(q, k, v, 64 * 4 * d, SlowMemory(), causal, seen)
            grads = tiled_backward(q, k, v, out, log_sum, grad, 64, causal, seen)
            mask = _masked(torch.zeros(n, n), slice(0, n), slice(0, n), causal, seen) == 0
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            some = mask.any(1, keepdim=True)  # of queries that see nothing, outputs and gradients are zero
            visible = mask | ~some
            query, key, value = (x[None] for x in leaves)
            expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)[0] * some
            expected.backward(grad)
            forward.append(float((out - expected.detach()).abs().max()))
            for mine, leaf in zip(grads, leaves, strict=True):
                assert leaf.grad is not None
                backward.append(float((mine - leaf.grad).abs().max()))
            if seen is None:
                chunked = attention(*(x.view(1, n, 1, d) for x in (q, k, v)), causal=causal, backend="chunked")
                ours.append(float((chunked.view(n, d) - out).abs().max()))
    return {"forward": max(forward), "backward": max(backward), "ours": max(ours)}


def traffic(seed: int) -> Figures:
    """Count accesses to slow memory at lengths from 512 to 4096, of the standard algorithm and of tiles."""
    generator, figures = torch.Generator().manual_seed(seed), Figures()
    lengths = [512, 1024, 2048, LENGTH]
    for name in ("standard", *SRAM):
        figures[f"accesses {name}"] = counts = []
        for n in lengths:
            q, k, v = (torch.randn(n, D_HEAD, generator=generator) for _ in range(3))
            memory = SlowMemory()
            if isinstance(name, int):
                tiled(q, k, v, name, memory)
            else:
                standard(q, k, v, memory)
            counts.append(memory.elements)
    return figures | {"lengths": lengths}


def share(figures: Figures, sram: int) -> float:
    """Divide the accesses of tiles by those of the standard algorithm at the greatest length."""
    return figures[f"accesses {sram}"][-1] / figures["accesses standard"][-1]


def slope(figures: Figures) -> float:
    """Give the exponent with which the standard algorithm's accesses grow from 2048 to 4096 positions."""
    return math.log2(figures["accesses standard"][-1] / figures["accesses standard"][-2])


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    left, right = figure.subplots(1, 2)
    lengths = runs[0]["lengths"]
    for name in ("standard", *SRAM):
        left.loglog(lengths, runs[0][f"accesses {name}"], marker="o",
                    label=f"tiles, fast memory of {name:,}" if isinstance(name, int) else "standard")
    left.set(xlabel="positions", ylabel="elements loaded and stored", title="accesses to slow memory, d = 64")
    left.legend()
    for index, figures in enumerate(runs):
        right.plot(figures["loss sdpa"], color="tab:gray", linewidth=3, label="torch's kernel" if not index else None)
        right.plot(figures["loss chunked"], color="tab:blue", linewidth=1, label="ours by tiles" if not index else None)
    right.set(xlabel="step", ylabel="loss (nats)", title="a small model, three seeds")
    right.legend()


REPRODUCTION = Reproduction(
    title="FlashAttention",
    paper="Dao, Fu, Ermon, Rudra, Re, 2022",
    claim="exact attention with O(N^2 d^2 / M) accesses to slow memory where the standard algorithm has O(Nd + N^2): "
          "GPT-2 medium's attention moves 4.4 GB instead of 40.3; training is 3 times faster at the same perplexity",
    miniature="algorithm 1 on counted slow memory at N = 4096, d = 64, beside algorithm 0; tiles, their gradients and "
              "our chunked attention beside torch's kernel at 300 positions, tiles of 64, causal and not, rows that "
              "see nothing; 100 steps of a two-layer model on 8 x 600 bytes of library source with either",
    run=run,
    plot=plot,
    criteria=(
        Criterion("accesses over standard, fast memory of 25,600", lambda figures: share(figures, SRAM[0]),
                  at_least=0.476, at_most=0.506),  # 0.491 by the formula, and 3 %
        Criterion("and of 51,200", lambda figures: share(figures, SRAM[1]), at_least=0.247, at_most=0.263),  # 0.255
        Criterion("exponent of the standard algorithm's accesses", slope, at_least=1.95),
        Criterion("error of tiles", lambda figures: figures["forward"], at_most=1e-5),
        Criterion("error of their gradients", lambda figures: figures["backward"], at_most=1e-4),
        Criterion("difference of ours to tiles", lambda figures: figures["ours"], at_most=1e-5),
        Criterion("difference of losses after 100 steps",
                  lambda figures: abs(figures["loss sdpa"][-1] - figures["loss chunked"][-1]), at_most=1e-3),
    ),
)

if __name__ == "__main__":
    main(REPRODUCTION)
