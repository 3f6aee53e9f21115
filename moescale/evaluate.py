"""Held-out text through the model: its loss, which experts it gets, and how far that moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moescale.config import Config
from moescale.data.batches import Batch, held_out_batches, held_out_windows
from moescale.data.split import TokenSplit
from moescale.data.tokenizer import Tokenizer, pieces
from moescale.engine.base import Engine
from moescale.monitor.seen import HeldOutRecorder
from moescale.parallel.mesh import Mesh
from moescale.record.held_out import LIKELY, SHOWN_TOKENS, HeldOutRouting, moved

KEPT_TOKENS = 4096  # of an evaluation, whose routing is kept for the report
FOLLOWED_TOKENS = 512  # whose experts are compared every so often


class Evaluation:
    """Evaluates a run on one rank, the same text each time."""

    def __init__(
        self, config: Config, mesh: Mesh, split: TokenSplit, tokenizer: Tokenizer, run_dir: Path,
        report: Callable[[str], None],
    ) -> None:
        """report: is told where the experts of held-out tokens cannot be written."""
        self.report = report
        self.config, self.mesh, self.split, self.tokenizer, self.run_dir = config, mesh, split, tokenizer, run_dir
        self.layers = [index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe"]
        seq_len = config.data.seq_len
        self.windows = held_out_windows(split, seq_len, config.monitor.eval_sequences)
        kept, self.followed_sequences = (max(1, tokens // seq_len) for tokens in (KEPT_TOKENS, FOLLOWED_TOKENS))
        every = max(1, len(self.windows) // kept)  # from all of the text, which may be sorted by kind
        self.kept, self.followed = (
            HeldOutRecorder(mesh.world_group, mesh.device, num_layers=config.model.num_layers, top_k=config.moe.top_k,
                            seq_len=seq_len, sequences=sequences, likely=likely)
            for sequences, likely in (
                (range(0, len(self.windows), every)[:kept], (SHOWN_TOKENS, min(LIKELY, config.moe.num_experts))),
                (range(self.followed_sequences), (0, 0))))
        self._before: np.ndarray | None = None  # the experts that `follow` saw last, on the first rank

    def run(self, engine: Engine) -> dict[str, float]:
        """Keep which experts the tokens get, for the report. -> the losses of this moment, of all ranks"""
        with self.kept.recording(engine):
            loss = engine.evaluate(self._batches(self.config.monitor.eval_sequences))
        found = self.kept.result(self.layers) if self.layers else None
        if found is not None:
            texts, kinds = self._text()
            routing = HeldOutRouting(engine.step_count, np.array(self.layers), self.config.data.seq_len,
                                     np.array(texts), np.array(kinds), **vars(found))
            try:
                routing.save(self.run_dir)
            except OSError as error:
                self.report(f"the experts of held-out tokens cannot be written to {self.run_dir}: {error.strerror}; "
                            "the report lacks them")
        return {"eval_loss": loss, "eval_bits_per_byte": self.split.bits_per_byte(loss)}

    def follow(self, engine: Engine) -> dict[str, float]:
        """Look at a few sequences. -> on the first rank, how far their routing has moved since the last look"""
        if not self.layers:
            return {}
        with self.followed.recording(engine):
            engine.evaluate(self._batches(self.followed_sequences))
        found, before = self.followed.result(self.layers), self._before
        if found is None:
            return {}
        self._before = found.expert
        num_tokens = min(self._before.shape[1], self.split.num_tokens - 1)
        return {} if before is None else moved(self._before, before, self.layers, num_tokens)

    def _batches(self, num_sequences: int) -> list[Batch]:
        """Give this rank's part, on its device."""
        batches = held_out_batches(
            self.split, seq_len=self.config.data.seq_len, num_sequences=num_sequences, rank=self.mesh.batch_rank,
            num_ranks=self.mesh.batch_size, micro_batch=self.config.data.micro_batch or 1,
        )
        return [batch.to(self.mesh.device) for batch in batches]

    def _text(self) -> tuple[list[str], list[str]]:
        """Give the text of each token whose experts are kept, and the kind of its file; kinds are empty for padding."""
        seq_len = self.config.data.seq_len
        texts: list[str] = []
        kinds: list[str] = []
        for sequence in self.kept.sequences:
            start = self.windows[sequence]
            length = min(seq_len, self.split.num_tokens - 1 - start)
            padding = [""] * (seq_len - length)
            texts += [*shown(self.tokenizer, self.split.window(start, length)[0].tolist()), *padding]
            kinds += self.split.kinds_of(start, length) + padding
        return texts, kinds


def shown(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Share the text of documents' tokens out over them, a mark for each beginning and end. -> for each id its text

    A character of several tokens is shown on the last of them.
    """
    found: list[str] = []
    document: list[int] = []  # of the document that is being read
    for index in ids:
        if index in (tokenizer.begin, tokenizer.end):
            found += [*pieces(tokenizer, document), "\N{PILCROW SIGN}"]
            document = []
        else:
            document.append(index)
    return found + pieces(tokenizer, document)
