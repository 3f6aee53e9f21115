"""scikit-learn's 8x8 digits, which more than one paper is tried on: a real data set that needs no download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [number, 64] from 0 to 1 and labels [number] int64, then those of a test set, a fifth of all."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    test = len(x) // 5
    return x[test:], y[test:], x[:test], y[:test]
