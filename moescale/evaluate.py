"""Held-out text through the model: its loss, and which experts it gets."""

from __future__ import annotations

import math
from pathlib import Path

from moescale.config import Config
from moescale.data.batches import held_out_batches
from moescale.data.token_file import TokenSplit
from moescale.data.tokenizer import load_tokenizer
from moescale.engine.base import Engine
from moescale.monitor.held_out import HeldOutRouting
from moescale.monitor.record import HeldOutRecorder
from moescale.parallel.mesh import Mesh


class Evaluation:
    """Evaluates a run on one rank, the same text each time."""

    def __init__(self, config: Config, mesh: Mesh, split: TokenSplit, run_dir: Path) -> None:
        self.config, self.mesh, self.split, self.run_dir = config, mesh, split, run_dir
        self.layers = [index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe"]
        self.recorder = HeldOutRecorder(mesh.world_group, num_layers=config.model.num_layers, top_k=config.moe.top_k,
                                        seq_len=config.data.seq_len)

    def run(self, engine: Engine) -> dict[str, float]:
        """-> the figures of this moment, of all ranks; on the first one also how far the routing has moved"""
        data, split = self.config.data, self.split
        batches = held_out_batches(
            split, seq_len=data.seq_len, num_sequences=self.config.monitor.eval_sequences,
            rank=self.mesh.batch_rank, num_ranks=self.mesh.batch_size, micro_batch=data.micro_batch or 1,
        )
        with self.recorder.recording(engine.model):
            loss = engine.evaluate([batch.to(self.mesh.device) for batch in batches])
        bits = loss * split.num_tokens / split.text_bytes / math.log(2)
        return {"eval_loss": loss, "eval_bits_per_byte": bits, **self._routing(engine.step_count)}

    def _routing(self, step: int) -> dict[str, float]:
        """Keep which experts the tokens got. -> how far that moved since the last time"""
        now = self.recorder.result(step, self.layers, self._text) if self.layers else None
        if now is None:
            return {}
        before = HeldOutRouting.load(self.run_dir)
        now.save(self.run_dir)
        return {} if before is None or before.step >= step else now.moved_since(before)

    def _text(self) -> list[str]:
        """-> the text of each token whose experts are kept"""
        data, tokenizer = self.config.data, load_tokenizer(self.config.data.tokenizer)
        batches = held_out_batches(self.split, seq_len=data.seq_len, num_sequences=self.config.monitor.eval_sequences,
                                   rank=0, num_ranks=1, micro_batch=1)[: self.recorder.tokens // data.seq_len]
        return ["" if serial < 0 else "\N{PILCROW SIGN}" if token == tokenizer.boundary else tokenizer.decode([token])
                for batch in batches for token, serial in zip(batch.tokens[0].tolist(), batch.serial[0].tolist(),
                                                              strict=True)]
