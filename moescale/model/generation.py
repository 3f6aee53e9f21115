"""Write on from prompts: one pass over all of them, then a step for each new token, over whatever the mixers keep."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moescale.errors import ConfigError
from moescale.layers.exact import Exact
from moescale.mixers.base import State
from moescale.moe.routers import Router
from moescale.ops.token_random import uniform_features

if TYPE_CHECKING:
    from moescale.model.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's scores. Raises ConfigError.

    temperature: what scores are divided by; 0 takes the likeliest token. top_k: draw among that many only. top_p: draw
    among the likeliest tokens that together have this probability. seed: the same one draws the same tokens.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: write a number from 0 up, e.g. 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: write a number from 1 up, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: write a number above 0 and up to 1, e.g. 0.9")


@dataclass
class Row:
    """One text of a batch. ids: of its tokens so far. sample: its number among those of its prompt."""

    ids: list[int]
    sample: int

    def start(self, context: int | None) -> int:
        """Return the first token that it looks back on: of at most `context`, and of more than half of that.

        It moves by half a context at a time, so that the tokens after it are read anew that often only.
        """
        if context is None or len(self.ids) <= context:
            return 0
        half = max(1, context // 2)
        return -(-(len(self.ids) - context) // half) * half


@torch.inference_mode()
def next_tokens(
    model: LanguageModel, prompts: Sequence[Sequence[int]], num_tokens: int, *, sampling: Sampling, samples: int = 1,
    stops: Collection[int] = (), num_ids: int | None = None, context: int | None = None,
) -> Iterator[list[int | None]]:
    """Draw the next token of every text, step by step, until all have ended or have `num_tokens` more.

    The texts are the samples of the first prompt, then those of the second; in each step a text that has ended gives
    None. A text ends with a token of `stops`. What it becomes does not depend on the others in the batch. num_ids:
    tokens from this one on are never drawn. context: how far a text looks back, None = to its first token.
    """
    _check(model, prompts, samples)
    model = for_decoding(model)
    rows = [Row(list(prompt), sample) for prompt in prompts for sample in range(samples)]
    live = list(range(len(rows)))
    length = max(len(row.ids) for row in rows) + num_tokens - 1
    length = length if context is None else min(length, context)
    # Each prompt is read once, whatever the number of its samples.
    scores, states = _read(model, rows[::samples], length, context)
    if samples > 1:
        prompt_of_row = torch.arange(len(prompts), device=scores.device).repeat_interleave(samples)
        scores = scores[prompt_of_row]
        for state in states:
            state.select(prompt_of_row)
    for left in reversed(range(num_tokens)):
        drawn = draw(scores[:, :num_ids], sampling, [rows[index] for index in live])
        given: list[int | None] = [None] * len(rows)
        before = [rows[index].start(context) for index in live]
        for index, token in zip(live, drawn, strict=True):
            given[index] = token
            rows[index].ids.append(token)
        yield given
        going = [index for index, token in enumerate(drawn) if token not in stops]
        if not left or not going:
            return
        # Texts that have ended leave the batch.
        if len(going) < len(live):
            live, before = [live[index] for index in going], [before[index] for index in going]
            for state in states:
                state.select(torch.tensor(going, device=scores.device))
        texts = [rows[index] for index in live]
        starts = [row.start(context) for row in texts]
        if starts != before:  # some text has come to the end of its context
            scores, states = _read(model, texts, length, context)
        else:
            newest = [[row.ids[-1], len(row.ids) - 1 - start] for row, start in zip(texts, starts, strict=True)]
            tokens, positions = torch.tensor(newest, device=scores.device).unsqueeze(2).unbind(1)
            scores = model.next_scores(tokens, positions, positions, states)


def draw(scores: Tensor, sampling: Sampling, rows: Sequence[Row]) -> list[int]:
    """Draw a token for each row, by its sample and its length alone. scores: [rows, vocab]"""
    scores = scores.double()
    if not scores.isfinite().all():
        raise ConfigError("the model's scores are not finite numbers: take an earlier checkpoint")
    if sampling.temperature == 0:
        return scores.argmax(-1).tolist()
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    # The best score becomes 0, so that it is finite however small the temperature.
    odds = ((scores - scores.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        best, order = odds.sort(dim=-1, descending=True, stable=True)
        best = best.masked_fill(best.cumsum(-1) - best >= sampling.top_p, 0)  # what likelier ones have is enough
        odds = torch.zeros_like(odds).scatter_(1, order, best)
    token_ids = torch.tensor([row.sample * 2**32 + len(row.ids) for row in rows], device=scores.device)
    high, low = uniform_features(token_ids, sampling.seed, 2).double().unbind(-1)  # 24 bits each
    sums = odds.cumsum(-1)
    level = (high + low / 2**24).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, level, right=True).squeeze(1).tolist()


def for_decoding(model: LanguageModel) -> LanguageModel:
    """Copy the modules, so that nothing is dropped or random, with weights cast once to what they are used in.

    Weights that need no cast are shared, not copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            dtype = parameter.dtype if isinstance(module, Exact) else model.compute_dtype
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    model = copy.deepcopy(model, memo).eval()
    for module in model.modules():
        if isinstance(module, Router):
            module.set_dropless(True)
    return model


def _check(model: LanguageModel, prompts: Sequence[Sequence[int]], samples: int) -> None:
    assert model.embedding is not None
    num_rows = len(model.embedding.weight)
    if not prompts or samples < 1:
        raise ConfigError(f"{len(prompts)} prompts and samples={samples}: write at least one of each")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens: begin it with the one that begins documents")
        if not 0 <= min(prompt) <= max(prompt) < num_rows:
            raise ConfigError(f"prompt {number} has tokens that the model does not know: write ids below {num_rows}")


def _read(
    model: LanguageModel, rows: Sequence[Row], length: int, context: int | None
) -> tuple[Tensor, list[State]]:
    """Read what rows look back on in one pass, the newest tokens side by side: shorter rows have padding in front.

    Padding has position 0, so that it is a document of its own, and goes to no expert. Returns the scores of what
    follows, [rows, vocab], and the states.
    """
    tails = [row.ids[row.start(context) :] for row in rows]
    longest = max(map(len, tails))
    tokens = torch.zeros(len(tails), longest, dtype=torch.int64)
    positions, token_id = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for row, tail in enumerate(tails):
        own = slice(longest - len(tail), longest)
        tokens[row, own] = torch.tensor(tail)
        positions[row, own] = token_id[row, own] = torch.arange(len(tail))
    states = model.new_states(len(rows), length)
    device = model.device
    return model.next_scores(tokens.to(device), positions.to(device), token_id.to(device), states), states
