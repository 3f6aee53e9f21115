"""Weights that are float32 whatever a model computes in."""

from __future__ import annotations

from torch import nn


class Exact(nn.Module):
    """A module whose own weights are never rounded to the dtype that a model computes in, as routers' are not."""
