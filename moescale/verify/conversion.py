"""`moescale convert --verify`: both models on the same tokens, each as its own format understands it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from moescale.checkpoint.fingerprint import digests, fingerprints
from moescale.checkpoint.mapped import Opened, atoms_of
from moescale.checkpoint.native import PLANES
from moescale.config import ConfigError
from moescale.model.build import build_model
from moescale.verify import megatron

SEQUENCES, SEQ = 2, 64
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def compare_models(source: Opened, written: Opened, found: Mapping[str, str], *, same: bool = True) -> str:
    """Read what was written, hold it to its fingerprints, and run both models.

    found: fingerprints of what was meant to be written. same: whether the logits must agree.
    -> a line with the largest difference. Raises ConfigError.
    """
    parts: dict[str, str] = {}
    for name, values in atoms_of(written, lambda name: not name.startswith(PLANES)):
        parts.update(digests(name, values))
    wrong = [name for name, digest in fingerprints(parts).items() if found.get(name) != digest]
    if wrong:
        raise ConfigError(f"--verify: {wrong[-1]} of the {written.format} checkpoint is not what was converted; "
                          "nothing was written")
    tokens = torch.randint(source.config.model.vocab_size, (SEQUENCES, SEQ), generator=torch.Generator().manual_seed(0))
    before, after = logits(source, tokens), logits(written, tokens)
    difference, size = float((before - after).abs().max()), float(before.abs().max())
    dtypes = {stored.dtype for opened in (source, written) for stored in opened.tensors.values()}
    tolerance = max(TOLERANCE.get(dtype, 1e-5) for dtype in dtypes)
    line = f"largest difference of the logits {difference:.3g}, of logits up to {size:.3g}"
    if same and not difference <= tolerance * max(1.0, size):
        raise ConfigError(f"--verify: {line}, is more than {tolerance:g} of them; nothing was written")
    return line


def logits(opened: Opened, tokens: Tensor) -> Tensor:
    """tokens: [batch, seq] int64. -> [batch, seq, vocab] float32"""
    if opened.format == "hf" and importlib.util.find_spec("transformers"):
        from moescale.verify.transformers import logits as transformers_logits

        return transformers_logits(opened.path, tokens)
    if opened.format == "megatron":
        return megatron.logits(opened, tokens)
    precision = opened.config.precision.model_copy(update={"compute": "float32"})
    model = build_model(opened.config.model_copy(update={"precision": precision}), "cpu")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "statistics" not in name}
    for name, values in atoms_of(opened, lambda name: not name.startswith(PLANES)):
        head, _, expert = name.rpartition(".")
        (tensors[head][int(expert)] if expert.isdigit() else tensors[name]).copy_(values)
    model.load_state_dict(tensors, strict=False)
    return model.logits(tokens)
