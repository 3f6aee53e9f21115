"""Hugging Face's own code on a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def logits_and_margins(
    path: Path, batches: Sequence[Tensor], dtype: torch.dtype | None
) -> list[tuple[Tensor, Tensor]]:
    """Run a model in float32, with weights rounded to `dtype` first. batches: tokens, each [batch, seq] int64.

    -> of each: [batch, seq, vocab] float32; [batch, seq], by how much of its probability a router prefers the last
    expert that a token gets to the next one, in the layer where that is least; infinite without such a choice
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return [_run(model, tokens) for tokens in batches]


def _run(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    margins = torch.full(tokens.shape, torch.inf)
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    if not top_k:
        return model(tokens).logits, margins
    found = model.base_model(tokens, output_router_logits=True)  # the head would ask for a loss of the routers
    for router_logits in found.router_logits or ():
        if top_k >= router_logits.shape[-1]:
            continue
        best = router_logits.float().softmax(-1).topk(top_k + 1).values
        margins = torch.minimum(margins, (best[:, -2] - best[:, -1]).view(tokens.shape))
    return model.lm_head(found.last_hidden_state), margins
