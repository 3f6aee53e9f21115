"""Token splits that lie in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moescale.data.pack import Pack, block_checksums
from moescale.data.split import TokenSplit


def make_split(tokens: Sequence[np.ndarray], starts: Sequence[np.ndarray], vocab_size: int) -> TokenSplit:
    """Make a stream of all documents of some packs. tokens, starts: of each pack, as a Pack has them."""
    packs = [Pack(Path("nowhere"), tokens=some, starts=first, texts=np.arange(len(first), dtype=np.uint64),
                  text_bytes=np.ones(len(first), dtype=np.uint32), kinds=np.zeros(len(first), dtype=np.uint8),
                  blocks=block_checksums(some), kind_names=(".txt",), vocab_size=vocab_size, options="", files=())
             for some, first in zip(tokens, starts, strict=True)]
    return TokenSplit.of(packs, [np.ones(len(first), dtype=bool) for first in starts])
