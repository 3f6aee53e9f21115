"""Hugging Face's own code on a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


@torch.no_grad()
def logits(path: Path, tokens: Tensor) -> Tensor:
    """tokens: [batch, seq] int64. -> [batch, seq, vocab] float32"""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    scores: Tensor = model.eval()(tokens).logits
    return scores
