"""Train mixtures of experts, from one laptop process to a torchrun cluster, and see where every token goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moescale.model.language_model import LanguageModel

__version__ = "0.1.0"


def load(checkpoint_dir: str | Path) -> LanguageModel:
    """Load the model of a checkpoint on one process, whatever layout wrote it.

    checkpoint_dir: a checkpoint, or a run directory for its last one. Raises ValueError for anything else.
    Returns the model; `model.logits(tokens)` scores tokens [batch, seq] as [batch, seq, vocab] float32, and
    `model.generate(prompts, num_tokens)` writes on.
    """
    from moescale.generate import load_model  # only now, so that `import moescale` needs torch alone

    return load_model(Path(checkpoint_dir))[0]
