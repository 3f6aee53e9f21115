"""Keys of a model, written side by side in tests and laid into the groups that have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.spec.attention import AttentionConfig
from moescale.spec.feed_forward import FeedForwardConfig

KINDS = {"attention": AttentionConfig, "feed_forward": FeedForwardConfig}


def in_groups(keys: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Lay keys of attention and of dense feed-forwards into their groups, and the others into `model`."""
    groups: dict[str, dict[str, Any]] = {"model": {}, **{name: {} for name in KINDS}}
    for key, value in keys.items():
        groups[next((name for name, kind in KINDS.items() if key in kind.model_fields), "model")][key] = value
    return groups
