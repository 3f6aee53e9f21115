"""Which experts held-out tokens got in the last evaluation: `held_out_routing.npz`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FILE = "held_out_routing.npz"
SHOWN_TOKENS = 768  # of which a page shows the text
LIKELY = 8  # experts of which it shows the probability


@dataclass(frozen=True)
class HeldOutRouting:
    """The experts of some held-out text.

    step: of the evaluation. layers: [layers] int64, the blocks that are mixtures. seq_len: tokens of each sequence.
    pieces: [tokens] text of each token, empty where a later token shows the character that it is a part of.
    kinds: [tokens] the kind of file that it is from, empty = padding.
    expert: [layers, tokens, top_k] int16, the best first, -1 = none. weight: [layers, tokens, top_k] float32.
    likely, probability: [layers, SHOWN_TOKENS or less, LIKELY or less] int16 and float16, the experts of the largest
    probabilities of the router.
    """

    step: int
    layers: np.ndarray
    seq_len: int
    pieces: np.ndarray
    kinds: np.ndarray
    expert: np.ndarray
    weight: np.ndarray
    likely: np.ndarray
    probability: np.ndarray

    def save(self, directory: Path) -> None:
        """Raises OSError."""
        partial = directory / f"{FILE}.partial"
        with partial.open("wb") as file:
            np.savez_compressed(file, **asdict(self))
        partial.replace(directory / FILE)

    @staticmethod
    def load(directory: Path) -> HeldOutRouting | None:
        """-> what the last evaluation left; None where there is nothing to read"""
        try:
            with np.load(directory / FILE, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            return HeldOutRouting(step=int(values.pop("step")), seq_len=int(values.pop("seq_len")), **values)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def moved(now: np.ndarray, before: np.ndarray, layers: Sequence[int], num_tokens: int) -> dict[str, float]:
    """Compare the experts of the same tokens at two times, as sets.

    now, before: [layers, tokens, top_k], -1 = none, padding after the first num_tokens. layers: their blocks' indices.
    -> `moe/layer_NN/moved`, share of tokens of which not all experts are the same; `moe/moved`, the mean
    """
    other = (np.sort(now, -1) != np.sort(before, -1)).any(-1)[:, :num_tokens]
    shares = {f"moe/layer_{layer:02d}/moved": float(share) for layer, share in zip(layers, other.mean(1), strict=True)}
    return {**shares, "moe/moved": float(other.mean())}
