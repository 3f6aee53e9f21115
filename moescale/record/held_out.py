"""Which experts held-out tokens got in the last evaluation: `held_out_routing.npz`."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from moescale.files.reading import open_regular
from moescale.files.writing import replacing
from moescale.record.figures import of_all, of_layer

FILE = "held_out_routing.npz"
SHOWN_TOKENS = 768  # of which a page shows the text
LIKELY = 8  # experts of which it shows the probability
LARGEST = 1 << 30  # bytes of the file, unpacked
MOST_CHOICES = 256  # experts of a token


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
        """Put the arrays into the run directory, in the place of those of an earlier step. Raises OSError."""
        with replacing(directory / FILE) as file:
            np.savez_compressed(file, **asdict(self))

    @staticmethod
    def load(directory: Path) -> HeldOutRouting | None:
        """Read what the last evaluation left; None where there is nothing to read."""
        try:
            with open_regular(directory / FILE) as packed:
                with zipfile.ZipFile(packed) as archive:  # a packed entry may become a thousand times as large
                    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
                if sum(sizes.values()) > LARGEST or sizes.keys() != {f"{name}.npy" for name in NAMES}:
                    return None
                packed.seek(0)
                with np.load(packed, allow_pickle=False) as file:
                    values = {name: file[name] for name in NAMES}
            step, seq_len = (int(values.pop(name)) for name in ("step", "seq_len"))
            found = HeldOutRouting(step=step, seq_len=seq_len, **values)
            return found if found._is_whole() else None
        except Exception:  # bytes that are no arrays can fail in any way, and the rest of the report stands without
            return None

    def _is_whole(self) -> bool:
        """Say whether the shapes, types and texts are those of one evaluation."""
        tokens = len(self.pieces)
        shape, seen = (len(self.layers), tokens), (len(self.layers), min(tokens, SHOWN_TOKENS))
        numbers, shares, texts = (self.layers, self.expert, self.likely), (self.weight, self.probability), \
            (self.pieces, self.kinds)
        return (
            0 <= self.step < 1 << 53 and self.seq_len >= 1 and self.layers.ndim == 1
            and all(each.dtype.kind == "U" and each.shape == (tokens,) for each in texts)
            and all(len(each.tolist()) == tokens for each in texts)  # raises ValueError where one holds no characters
            and all(each.dtype.kind == "i" for each in numbers)
            and all(each.dtype.kind == "f" and bool(np.isfinite(each).all()) for each in shares)
            and self.expert.ndim == self.likely.ndim == 3 and self.expert.shape[:2] == shape
            and self.likely.shape[:2] == seen
            and self.expert.shape[2] <= MOST_CHOICES and self.likely.shape[2] <= LIKELY
            and self.weight.shape == self.expert.shape and self.probability.shape == self.likely.shape
        )

    def fits(self, layers: Sequence[int], num_experts: int) -> bool:
        """Say whether it is of a model with mixtures in these layers, of so many experts."""
        return self.layers.tolist() == list(layers) and all(
            not each.size or (each.min() >= -1 and each.max() < num_experts) for each in (self.expert, self.likely))


NAMES = tuple(field.name for field in fields(HeldOutRouting))


def moved(now: np.ndarray, before: np.ndarray, layers: Sequence[int], num_tokens: int) -> dict[str, float]:
    """Compare the experts of the same tokens at two times, as sets.

    now, before: [layers, tokens, top_k], -1 = none, padding after the first num_tokens. layers: their blocks' indices.
    -> the share of tokens of which not all experts are the same, of each layer and as a mean
    """
    other = (np.sort(now, -1) != np.sort(before, -1)).any(-1)[:, :num_tokens]
    shares = {of_layer("moved", layer): float(share) for layer, share in zip(layers, other.mean(1), strict=True)}
    return {**shares, of_all("moved"): float(other.mean())}
