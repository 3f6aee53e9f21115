"""Small checkpoints of a few tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from moescale.checkpoint.store import save_checkpoint


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(6, 4, generator=generator),
        "model.b": torch.randn(12, 8, 4, generator=generator),
        "optim.c": torch.randn(7, generator=generator).to(torch.bfloat16),
    }


def save(run_dir: Path, step: int = 1, keep: int = 3) -> Path:
    return save_checkpoint(run_dir, step, make_tensors(), {"seed": 5}, {"config.yaml": "x: 1\n"}, keep=keep)


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
