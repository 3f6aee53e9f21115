"""YAML of any origin, composed within bounds: of size, depth, and of what its aliases stand for when written out."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 1_000_000  # bytes of a file
DEEPEST = 20  # levels
MOST_NODES = 50_000  # each as often as aliases name it


class _Loader(yaml.BaseLoader):
    """Counts the nodes of a document while they are composed, and how deep they lie; every value stays a text."""

    count = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        self.depth += 1
        if self.depth > DEEPEST or self.count > MOST_NODES:
            raise yaml.YAMLError("it is nested too deeply or too long to be a configuration")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(text: str) -> yaml.Node | None:
    """Compose a document whose values are texts. Raises yaml.YAMLError, also for what is too large or holds itself."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it is longer than {LARGEST:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    if node is not None:
        _count(node, {})
    return node


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the nodes below one, shared ones each time. sizes: of those that were counted, 0 while they are."""
    known = sizes.get(id(node))
    if known == 0:
        raise yaml.YAMLError("a value in it holds itself")
    if known is not None:
        return known
    sizes[id(node)] = 0
    inner = [] if isinstance(node, yaml.ScalarNode) else node.value
    size = 1
    for item in inner:
        size += sum(_count(part, sizes) for part in (item if isinstance(item, tuple) else (item,)))
        if size > MOST_NODES:
            raise yaml.YAMLError("what its aliases stand for is too much for a configuration")
    sizes[id(node)] = size
    return size
