"""How well a trained model predicts text, on one process: held-out loss, and likelihoods as harnesses ask for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from moescale.checkpoint.store import read_last
from moescale.config import ConfigError
from moescale.data.batches import held_out_batches
from moescale.data.token_file import prepare_tokens
from moescale.generate import load_trained

EVALUATION_KEYS = ("data.", "monitor.eval_sequences", "precision.compute")  # that an evaluation may change
SEQUENCES_A_PASS, PASSES_AT_HAND = 16, 8


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    checkpoint, step: of the model. split: `held-out`, the run's own, or `files`, all of those
    that were named. loss: nats
    a token. documents, tokens, bytes: of the split; tokens that were predicted, which are fewer where
    monitor.eval_sequences limits them, are scored_tokens.
    """

    checkpoint: str
    step: int
    split: str
    loss: float
    perplexity: float
    bits_per_byte: float
    scored_tokens: int
    tokens: int
    documents: int
    bytes: int

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        what = "held-out documents of the run" if self.split == "held-out" else "documents of the files named"
        return (f"{self.split} loss {self.loss:.4f} nats a token, perplexity {self.perplexity:.4g}, "
                f"{self.bits_per_byte:.4f} bits a byte\n"
                f"{self.scored_tokens:,} tokens predicted, of {self.tokens:,} tokens and {self.bytes:,} bytes in "
                f"{self.documents:,} {what}\n{self.checkpoint}, step {self.step:,}")


def evaluate_checkpoint(
    path: Path, overrides: Sequence[str] = (), *, whole: bool = False
) -> tuple[Evaluated, list[str]]:
    """Predict the run's held-out documents, or all documents of other files. path: a checkpoint or a run directory.

    overrides: `key=value` of EVALUATION_KEYS; data.files names other files. whole: all of what was held out, where
    training looks at monitor.eval_sequences sequences from all over it. Raises ConfigError.
    -> what was found, and lines that the user should know
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    for key in keys:
        if not key.startswith(EVALUATION_KEYS):
            raise ConfigError(f"{key} cannot change in an evaluation: write data.files=[...], another key of data, "
                              f"{' or '.join(EVALUATION_KEYS[1:])}")
    if "data.files" in keys and "data.weights" not in keys:
        overrides = [*overrides, "data.weights=[]"]  # they were of other files
    return read_last(path, lambda folder: _evaluate(folder, overrides, keys, whole))


def _evaluate(
    folder: Path, overrides: Sequence[str], keys: Sequence[str], whole: bool
) -> tuple[Evaluated, list[str]]:
    trained = load_trained(folder, overrides)
    model, config, checkpoint, state = trained.model, trained.config, trained.checkpoint, trained.state
    held_out, data = "data.files" not in keys and "data.held_out_files" not in keys, config.data
    if data.tokenizer != "bytes" and "data.tokenizer" not in keys:  # the checkpoint's own copy of its tokenizer
        tokenizer = trained.tokenizer
        begin, end = (tokenizer.token_name(index) for index in (tokenizer.begin, tokenizer.end))
        data = data.model_copy(update={"tokenizer": tokenizer.name, "begin_token": begin, "end_token": end})
    if "data.files" in keys and "data.held_out_files" not in keys:
        data = data.model_copy(update={"held_out_files": data.files})
    corpus = prepare_tokens(data)
    of_training = ("data.held_out_files", "data.weights")
    notes = [note for note in dict.fromkeys(corpus.notes) if not any(key in note for key in of_training)]
    if held_out and state.get("corpus") not in (None, corpus.fingerprint):
        notes.append("the texts are not those that the run was trained with, so that some may have been trained on")
    split, seq_len = corpus.held_out, data.seq_len
    some = not whole and (held_out or "monitor.eval_sequences" in keys)
    limit = config.monitor.eval_sequences if some else split.num_tokens
    total, scored = 0.0, 0
    device = next(model.parameters()).device
    parts = max(1, math.ceil(min(limit, split.num_tokens / seq_len) / (SEQUENCES_A_PASS * PASSES_AT_HAND)))
    console = Console(stderr=True)
    with torch.no_grad(), Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        for part in shown.track(range(parts), description="evaluating"):
            for batch in held_out_batches(split, seq_len=seq_len, num_sequences=limit, rank=part, num_ranks=parts,
                                          micro_batch=SEQUENCES_A_PASS):
                batch = batch.to(device)
                sums = model(batch.tokens, targets=batch.targets, positions=batch.positions, token_id=batch.token_id)
                total += float(sums[0])
                scored += int((batch.targets >= 0).sum())
    loss = total / scored
    if not math.isfinite(loss):
        raise ConfigError(f"the loss of {checkpoint} is not a finite number: take an earlier checkpoint")
    text = "held-out" if held_out else "files"
    return Evaluated(str(checkpoint), state["step"], text, loss, math.exp(min(loss, 700.0)),
                     split.bits_per_byte(loss), scored, split.num_tokens, split.num_documents, split.text_bytes), notes


class Scorer:
    """Log-likelihoods of text under a checkpoint, in nats, as lm-evaluation-harness (0.4) defines them.

    path: a checkpoint or a run directory. Text is encoded as the tokenizer itself does, with the tokens that it puts
    before a text; data.seq_len is the longest context. Raises ConfigError.
    """

    def __init__(self, path: str | Path) -> None:
        trained = load_trained(Path(path))
        self.model, self.tokenizer = trained.model, trained.tokenizer
        self.context, self.num_rows = trained.config.data.seq_len, trained.config.model.vocab_size

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Score a continuation, given the text before it.

        Spaces at the end of the context count to the continuation. -> its log-likelihood, and whether each of its
        tokens is the likeliest one
        """
        if not context:
            ids = self.tokenizer.encode_special(continuation).tolist()
            begin = self.tokenizer.begin
            return self._score(ids[:1], ids[1:]) if ids[:1] == [begin] else self._score([begin], ids)
        text = context.rstrip()
        before, whole = (self.tokenizer.encode_published(part).tolist() for part in (text, context + continuation))
        return self._score(before or [self.tokenizer.begin], whole[len(before) :])

    def loglikelihood_rolling(self, text: str) -> float:
        """Score a whole text, window by window, each token once. -> its log-likelihood"""
        return sum(self._score(before, wanted)[0] for before, wanted in self._windows(
            self.tokenizer.encode_published(text).tolist()))

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Give pairs of ids known and ids to be predicted; windows after the first know one id of the one before."""
        size = self.context
        if ids:
            yield [self.tokenizer.begin], ids[:size]
        for start in range(size, len(ids), size):
            end = min(start + size, len(ids))
            yield ids[max(0, end - size - 1) : start], ids[start:end]

    @torch.no_grad()
    def _score(self, before: list[int], wanted: list[int]) -> tuple[float, bool]:
        """before: ids that are known, cut at the front where the context is too short. wanted: those that follow."""
        if len(wanted) > self.context:
            raise ConfigError(f"a continuation of {len(wanted)} tokens is longer than data.seq_len={self.context}: "
                              "score it as a whole text")
        if not wanted:
            return 0.0, True
        device = next(self.model.parameters()).device
        ids = torch.tensor([(before + wanted)[-self.context - 1 :]], device=device)
        if int(ids.max()) >= self.num_rows:
            raise ConfigError("the text holds a special token for which the model has no row: leave it out")
        scores = self.model.logits(ids[:, :-1])[0, -len(wanted) :].double().log_softmax(-1)
        targets = ids[0, -len(wanted) :]
        total = scores.gather(1, targets.unsqueeze(1)).sum()
        return float(total), bool((scores.argmax(-1) == targets).all())
