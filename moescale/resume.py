"""A run that goes on: where it lies, what differs from its checkpoint, and where it stands in data and schedule.

`Standing` is what the trainer needs of a checkpoint beside weights and moments. A run that begins has the empty one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moescale.checkpoint.store import MANIFEST, latest_checkpoint, read_state
from moescale.config import Config, ConfigError, load_config
from moescale.config.changes import (
    Difference,
    decides_function,
    decides_text,
    differences,
    is_allowed,
    is_harmless,
)
from moescale.config.read import read_overrides
from moescale.data.batches import START, Batches, Position, num_windows
from moescale.data.token_file import TokenCorpus
from moescale.data.tokenizer import Tokenizer, tokenizer_of_checkpoint
from moescale.optim.schedule import Peak, first_peak, learning_rate, peak_after_change
from moescale.record.metrics import FILE
from moescale.spec.model import describe

LIBRARY_EPOCHS = 50.0  # of Python's own library, which is there to try things out
MOST_TOKENS = 2**62  # that can be numbered


@dataclass(frozen=True)
class Standing:
    """Where a run stands when it begins or goes on.

    start: in its data. peak: where the learning rate falls from; None is after the warm-up. notes: lines to print.
    """

    start: Position = START
    peak: Peak | None = None
    notes: tuple[str, ...] = ()


def first_batches(config: Config, corpus: TokenCorpus, start: Position) -> Batches:
    """Order the training text. start: where the run stands in it.

    Raises ConfigError when the run would see it too often.
    """
    data, steps = config.data, config.run.steps
    batches = order_text(config, corpus, start)
    epochs = batches.epochs(steps)
    limit = LIBRARY_EPOCHS if data.max_epochs is None and corpus.is_default else data.max_epochs
    if limit is not None and epochs > limit:
        text = "the source of Python's own library" if corpus.is_default else "the text in data.files"
        raise ConfigError(f"run.steps={steps} would see {text}, {corpus.train.num_tokens / 1e6:,.1f}M tokens, "
                          f"{epochs:,.2f} times, and {limit:g} are allowed: name more text in data.files, or write "
                          f"data.max_epochs={math.ceil(epochs)}")
    return batches


def order_text(config: Config, corpus: TokenCorpus, start: Position) -> Batches:
    """Order the training text from a position on."""
    data = config.data
    return Batches(corpus.blend or corpus.train, seq_len=data.seq_len, global_batch=data.global_batch,
                   seed=config.run.seed, start=start, batch_schedule=data.batch_schedule)


def locate(config: Config, path: Path, overrides: Sequence[str]) -> Config:
    """Settle where a run lies whose configuration was read from this file.

    A config.yaml in a run directory belongs to that run. It is refused when it names another directory and no
    override does, as after a move, and so is a new run from random weights with the configuration of converted ones.
    A tokenizer that lies beside it, or in the last checkpoint, is found there.
    Raises ConfigError.
    """
    home = path.resolve().parent.parent.parent if (path.parent / MANIFEST).exists() else path.parent
    checkpoint = latest_checkpoint(home)
    if checkpoint is None and not (home / FILE).exists():
        return config
    given = read_overrides(overrides)
    run_dir = Path(config.run.dir).expanduser()
    if run_dir.resolve() != home.resolve():
        if "dir" not in given.get("run", {}):
            raise ConfigError(f"{path} lies in the run directory {home} and names another, run.dir={config.run.dir}: "
                              f"write run.dir={home} to go on there, or the run.dir that is meant")
        converted = checkpoint is not None and read_state(checkpoint).get("converted", False)
        if converted and latest_checkpoint(run_dir) is None:
            raise ConfigError(f"{path} belongs to the converted weights in {home}, and run.dir={config.run.dir} would "
                              f"begin with random ones: leave run.dir out, or copy {home} to {config.run.dir} first")
    else:  # by the name that was given now
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(home)})})
    if "tokenizer" in given.get("data", {}) or config.data.tokenizer in (None, "bytes"):
        return config
    files = [home / config.data.tokenizer, Path(config.data.tokenizer).expanduser()]
    if checkpoint is not None:
        files.append(checkpoint / "tokenizer.json")
    found = next((str(sequence) for sequence in files if sequence.exists()), config.data.tokenizer)
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": found})})


TOKENIZER_KEYS = {"data.tokenizer", "data.begin_token", "data.end_token"}


def go_on(checkpoint: Path, config: Config, corpus: TokenCorpus, tokenizer: Tokenizer) -> Standing:
    """Compare a run with the checkpoint that it goes on from, and find where it stands.

    config: settled. Raises ConfigError with the keys that may not differ.
    """
    state, old = read_state(checkpoint), load_config(checkpoint / "config.yaml", whole=True)
    tokenizers = _known_tokenizers(checkpoint, state, old)
    same_tokenizer = not tokenizers or tokenizer.fingerprint in tokenizers
    if not state.get("optimizer", True):
        other = [] if same_tokenizer else _other_tokenizer(tokenizers, checkpoint, old, config, tokenizer)
        return _begin(checkpoint, state, old, config, other)
    changed = [change for change in differences(old, config) if change.key != "run.allow_changes"]  # of this start
    keys = {change.key for change in changed}
    text_keys = {key for key in keys if decides_text(key)} - (TOKENIZER_KEYS if same_tokenizer else set())
    same_text = state["corpus"] == corpus.fingerprint if "corpus" in state else not text_keys and same_tokenizer
    if not same_tokenizer and not keys & TOKENIZER_KEYS:
        changed += _other_tokenizer(tokenizers, checkpoint, old, config, tokenizer)
    elif not same_text and not text_keys:
        changed.append(Difference("data.files", f"text {str(state['corpus'])[:12]}", f"text {corpus.fingerprint[:12]}"))

    def harmless(key: str) -> bool:
        if decides_text(key):
            return same_tokenizer if key in TOKENIZER_KEYS else key in text_keys and same_text
        return is_harmless(key, old, config)

    _refuse(checkpoint, old, config, [change for change in changed if not harmless(change.key)])
    before = _position(checkpoint, state, old)
    start = _translated(before, old, config, corpus) if same_text else Position(before.step, 0, before.tokens)
    old_peak = _peak(checkpoint, state, old)
    peak = peak_after_change(before.step, old.run.steps, old.optim, old_peak, config.run.steps, config.optim)
    notes = [f"changed since {checkpoint.name}: {change}" for change in changed]
    notes += [f"run.allow_changes names {name}, which is as it was" for name in config.run.allow_changes
              if not any(is_allowed(change.key, (name,)) for change in changed)]
    if "corpus" not in state:
        notes.append(f"{checkpoint.name} does not say which text was trained on and which was held out: whether they "
                     "are the same is not known")
    notes += _told_position(before, start, old, config, corpus) if same_text else [
        "the order of the new text begins with its first sequence"]
    notes += _told_rate(before.step, (old, old_peak), (config, peak))
    return Standing(start, peak, tuple(notes))


def _begin(
    checkpoint: Path, state: Mapping[str, Any], old: Config, config: Config, tokenizer: Sequence[Difference]
) -> Standing:
    """Begin with weights that no run has trained here: what they compute may not change, all else is new."""
    changed = [*tokenizer, *(change for change in differences(old, config) if decides_function(change.key)
                             and not is_harmless(change.key, old, config))]
    _refuse(checkpoint, old, config, changed)
    return Standing(Position(state["step"]), None, (
        *(f"changed since {checkpoint.name}: {change}" for change in changed),
        f"{checkpoint.name} holds weights alone: the optimizer, the schedule and the data begin anew"))


def _refuse(checkpoint: Path, old: Config, config: Config, changed: Sequence[Difference]) -> None:
    refused = [change for change in changed if not is_allowed(change.key, config.run.allow_changes)]
    weights, old_weights = ({".".join(weight.name): weight.shape for weight in describe(each).weights()}
                            for each in (config, old))
    if weights != old_weights:
        name = next(name for name in (*old_weights, *weights) if old_weights.get(name) != weights.get(name))
        keys = ", ".join(change.as_it_was for change in changed if decides_function(change.key))
        raise ConfigError(f"{checkpoint} is a checkpoint of another model, whose {name} is "
                          f"{_shape(old_weights, name)} there and {_shape(weights, name)} here: {keys}; write them as "
                          "they were, or another run.dir")
    if refused:
        names = ",".join(change.key for change in refused)
        raise ConfigError(f"{checkpoint} was written with {', '.join(change.as_it_was for change in refused)}: write "
                          f"{'it as it was' if len(refused) == 1 else 'them as they were'} to go on, "
                          f"run.allow_changes=[{names}] to go on all the same, or another run.dir to start anew")


def _shape(weights: Mapping[str, Sequence[int]], name: str) -> str:
    return str(list(weights[name])) if name in weights else "absent"


def _known_tokenizers(checkpoint: Path, state: Mapping[str, Any], old: Config) -> set[str]:
    """Return the fingerprints that the checkpoint's tokenizer may have; none if it came without one."""
    known = {str(state["tokenizer"])} if "tokenizer" in state else set()
    bytes_alone = old.data.tokenizer == "bytes" and not state.get("converted", False)
    if bytes_alone or (checkpoint / "tokenizer.json").exists():
        known.add(tokenizer_of_checkpoint(old.data, checkpoint, state["step"]).fingerprint)
    return known


def _other_tokenizer(
    known: Collection[str], checkpoint: Path, old: Config, config: Config, tokenizer: Tokenizer
) -> list[Difference]:
    """Say what the checkpoint's tokenizer was, whose file may be the same and only its beginnings and ends others."""
    was, now = old.data.tokenizer, config.data.tokenizer
    if (checkpoint / "tokenizer.json").exists():
        theirs = tokenizer_of_checkpoint(old.data, checkpoint, read_state(checkpoint)["step"])
        if theirs.files.get("tokenizer.json") == tokenizer.files.get("tokenizer.json"):
            return [Difference(f"data.{key}", theirs.token_name(before), tokenizer.token_name(after))
                    for key, before, after in (("begin_token", theirs.begin, tokenizer.begin),
                                               ("end_token", theirs.end, tokenizer.end))]
    if was == now:
        was, now = f"{was} of fingerprint {min(known)[:40]}", f"{now} of fingerprint {tokenizer.fingerprint[:40]}"
    return [Difference("data.tokenizer", was, now)]


# ---- where it stands


def _position(checkpoint: Path, state: Mapping[str, Any], old: Config) -> Position:
    """Read where the run stood; checkpoints that do not say it were written by runs whose batch never changed."""
    sequences = state.get("sequences", state["step"] * old.data.global_batch)
    tokens = state.get("tokens", sequences * old.data.seq_len if isinstance(sequences, int) else None)
    if any(type(count) is not int or not 0 <= count < MOST_TOKENS for count in (sequences, tokens)):
        raise ConfigError(f"{checkpoint} is damaged: its {MANIFEST} says sequences={sequences!r}, tokens={tokens!r}")
    return Position(state["step"], sequences, tokens)


def _peak(checkpoint: Path, state: Mapping[str, Any], old: Config) -> Peak:
    """Read where the learning rate falls from; checkpoints that do not say it fall from the end of the warm-up."""
    match state.get("peak"):
        case None:
            return first_peak(old.optim)
        case [int(step), float(share)] if 0 <= step <= state["step"] + old.optim.warmup_steps and 0 <= share <= 1:
            return Peak(step, share)
        case other:
            raise ConfigError(f"{checkpoint} is damaged: its {MANIFEST} says peak={other!r}")


def _translated(before: Position, old: Config, config: Config, corpus: TokenCorpus) -> Position:
    """Say where the run stands in the same text, with sequences that may be of another length.

    They go on where as many tokens of the epoch were seen, which is exact between two epochs; of a blend, whose parts
    have epochs of their own, where as many tokens were seen.
    """
    if old.data.seq_len == config.data.seq_len:
        return before
    if corpus.blend is not None:
        return replace(before, sequences=-(-before.sequences * old.data.seq_len // config.data.seq_len))
    windows, old_windows = (num_windows(corpus.train, some.data.seq_len) for some in (config, old))
    epoch, sequence = divmod(before.sequences, max(1, old_windows))
    within = min(windows, -(-sequence * old.data.seq_len // config.data.seq_len))
    return Position(before.step, epoch * windows + within, before.tokens)


def _told_position(
    before: Position, start: Position, old: Config, config: Config, corpus: TokenCorpus
) -> list[str]:
    ways = [("data.seq_len", old.data.seq_len, config.data.seq_len), ("run.seed", old.run.seed, config.run.seed)]
    other = [name for name, was, now in ways if was != now]
    if other and corpus.blend is not None:
        return [f"{' and '.join(other)} changed: {before.tokens:,} tokens were seen, and sequence {start.sequences:,} "
                "comes next; as the order is another one, some text of this epoch comes again and some is left out "
                "until the next"]
    if other:
        windows = num_windows(corpus.train, config.data.seq_len)
        epoch, sequence = divmod(start.sequences, max(1, windows))
        within = "" if sequence == 0 else (
            "; as the order is another one, some text of this epoch comes again and some is left out until the next")
        return [f"{' and '.join(other)} changed: {before.tokens:,} tokens were seen, and epoch {epoch} goes on with "
                f"sequence {sequence:,} of {windows:,}{within}"]
    if old.data.batches != config.data.batches or old.data.batch_schedule != config.data.batch_schedule:
        batches = ", then ".join(map(str, config.data.batches))
        return [f"steps of {batches} sequences go on with the first one not seen, {start.sequences:,}"]
    return []


def _told_rate(step: int, before: tuple[Config, Peak], after: tuple[Config, Peak]) -> list[str]:
    (old, old_peak), (config, peak) = before, after
    if (old_peak == peak and old.optim.lr == config.optim.lr) or step >= config.run.steps:
        return []
    stood, stands, ends = (learning_rate(at, some.run.steps, some.optim, its) for at, some, its in (
        (step, old, old_peak), (step, config, peak), (config.run.steps - 1, config, peak)))
    return [f"the learning rate stood at {stood:.4g} and goes on from {stands:.4g}, to {ends:.4g} at step "
            f"{config.run.steps}" + (": it stays there, unless optim.lr is another" if stands == ends else "")]
