"""The papers' formulas, written for one sequence at a time and as slowly as they read. Nothing here imports ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Subtract the mean, divide by the standard deviation, scale; no bias (PaLM, section 2)."""
    centred = x - x.mean(-1, keepdim=True)
    return scale * centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square (Zhang and Sennrich, 2019, equation 4)."""
    return scale * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn the pair (i, i + head_dim/2) of position m by m theta^(-2i/head_dim) (RoFormer, equation 34).

    x: [seq, head_dim].
    """
    half = x.shape[-1] // 2
    angle = torch.tensor([[m * theta ** (-i / half) for i in range(half)] for m in range(len(x))], dtype=x.dtype)
    left, right = x[:, :half], x[:, half:]
    return torch.cat((left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()), -1)


def sinusoids(length: int, features: int) -> Tensor:
    """sin(m / 10000^(2i/features)) at feature 2i of position m, its cosine at 2i + 1 (Vaswani et al., section 3.5)."""
    return torch.tensor([[(math.cos if feature % 2 else math.sin)(m / 10_000 ** ((feature - feature % 2) / features))
                          for feature in range(features)] for m in range(length)], dtype=torch.float64)


def attention(
    x: Tensor, weights: Weights, num_heads: int, num_kv_heads: int, *, theta: float | None,
    sees: Callable[[int, int, int], bool], alibi: bool = False,
) -> Tensor:
    """Causal softmax attention, head by head and query by query. x: [seq, d_model]; returns the same shape.

    With one key head this is multi-query attention (Shazeer, 2019). sees: of head, query i and key j up to i, whether
    it is not masked. alibi: scores lose slope x distance (Press et al., 2022, section 3).
    """
    queries, keys, values = (
        (x @ weights[name].T).chunk(heads, -1)
        for name, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)))
    heads = []
    for head, q in enumerate(queries):
        k, v = (shared[head // (num_heads // num_kv_heads)] for shared in (keys, values))
        if theta is not None:
            q, k = rotate(q, theta), rotate(k, theta)
        rows = []
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if sees(head, i, j)]
            scores = k[seen] @ q[i] / math.sqrt(q.shape[-1])
            if alibi:
                slope = 2 ** (-8 * (head + 1) / num_heads)
                scores = scores - slope * (i - torch.tensor(seen, dtype=x.dtype))
            rows.append(scores.softmax(0) @ v[seen])
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ weights["o"].T


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's probability of being below x (Hendrycks and Gimpel, 2016)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def feed_forward(x: Tensor, weights: Weights, activation: str) -> Tensor:
    """The feed-forward and its gated variants (GLU Variants Improve Transformer, equations 5 and 6)."""
    up = x @ weights["up"].T
    if activation == "swiglu":
        gate = x @ weights["gate"].T
        hidden = gate / (1 + (-gate).exp()) * up
    elif activation == "geglu":
        hidden = gelu(x @ weights["gate"].T) * up
    else:
        hidden = gelu(up) if activation == "gelu" else up.clamp(min=0)
    return hidden @ weights["down"].T


def next_token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy, and log^2 of the softmax's normaliser (PaLM, section 5), each summed over targets."""
    log_z = logits.exp().sum(-1).log()
    return (log_z - logits[range(len(targets)), targets]).sum(), log_z.pow(2).sum()


def mixture(x: Tensor, router: Tensor, experts: list[Weights], activation: str, kind: str, *, top_k: int,
            capacity: float | None, draws: Tensor, bias: Tensor | None = None,
            groups: tuple[int, int] = (1, 1), normalize: bool = True) -> tuple[Tensor, Tensor]:
    """A layer of experts, token by token, and its balance loss summed over tokens. x: [seq, d_model].

    kind: "mixtral", softmax over the top_k logits (Mixtral of Experts, section 2.1) or, without `normalize`, the
    softmax over all (Jamba); "switch", the best expert by its probability (Switch Transformers, equations 1 to 6);
    "gshard", the best two normalised, the second one taken when twice its weight exceeds a uniform draw (GShard,
    algorithm 1); "sigmoid_bias" (DeepSeek-V3, equations 12 to 20, and node-limited routing): groups and experts are
    chosen with the bias, the balance loss counts the best without either; "expert_choice", each expert takes its best
    tokens (Zhou et al., 2022, equations 1 to 3).
    groups: how many there are, and how many of them a token's experts come from.
    capacity: slots over the even share, None = no limit.
    """
    num_tokens, num_experts = len(x), len(experts)
    logits = x @ router.T
    scores = 1 / (1 + (-logits).exp()) if kind == "sigmoid_bias" else logits.softmax(-1)
    probs = scores / scores.sum(-1, keepdim=True)
    out = [torch.zeros_like(token) for token in x]
    if kind == "expert_choice":
        assert capacity is not None
        for expert, weights in enumerate(experts):
            for t in probs[:, expert].argsort(descending=True)[: int(capacity * num_tokens / num_experts)].tolist():
                out[t] = out[t] + probs[t, expert] * feed_forward(x[t], weights, activation)
        return torch.stack(out), x.new_zeros(())
    affinity = best = probs.argsort(-1, descending=True)[:, :top_k].tolist()
    if kind == "sigmoid_bias":
        assert bias is not None
        best = [_within_groups((token + bias).tolist(), top_k, *groups) for token in scores]
    slots = math.inf if capacity is None else max(1, int(capacity * num_tokens * top_k / num_experts))
    used = [0] * num_experts
    for choice in range(top_k):
        for t, token in enumerate(x):
            expert = best[t][choice]
            as_it_is = kind == "switch" or not normalize
            weight = probs[t, expert] if as_it_is else scores[t, expert] / scores[t, best[t]].sum()
            left_out = kind == "gshard" and choice == 1 and not 2 * weight.item() > float(draws[t])
            if left_out or used[expert] >= slots:
                continue
            used[expert] += 1
            out[t] = out[t] + weight * feed_forward(token, experts[expert], activation)
    counted = 1 if kind in ("switch", "gshard") else top_k
    share = torch.zeros(num_experts, dtype=x.dtype)
    for choices in affinity:
        for expert in choices[:counted]:
            share[expert] += 1 / (counted * num_tokens)
    return torch.stack(out), num_experts * (share * probs.mean(0)).sum() * num_tokens


def _within_groups(scores: list[float], top_k: int, num_groups: int, chosen_groups: int) -> list[int]:
    size = len(scores) // num_groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]
    counted = max(1, top_k // chosen_groups)
    groups.sort(key=lambda group: sum(sorted(scores[expert] for expert in group)[-counted:]), reverse=True)
    experts = [expert for group in groups[:chosen_groups] for expert in group]
    return sorted(experts, key=lambda expert: scores[expert], reverse=True)[:top_k]


def router_z(x: Tensor, router: Tensor) -> Tensor:
    """log^2 of the router's normaliser, summed over tokens (ST-MoE, equation 5)."""
    return F.linear(x, router).exp().sum(-1).log().pow(2).sum()
