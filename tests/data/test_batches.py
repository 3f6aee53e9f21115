"""The order of sequences depends on the seed and the step alone, and every token has its target and position."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.config import ConfigError
from moescale.data.batches import Batch, Batches, Position, held_out_batches
from moescale.data.split import TokenSplit
from tests.support import splits

BOUNDARY = 256
FIELDS = ("tokens", "targets", "positions", "token_id")


def make_split(num_tokens: int, seed: int = 0) -> TokenSplit:
    """Make a stream of random documents, one to twenty tokens each, kept in two packs."""
    generator = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(generator.integers(1, 21, size=num_tokens))])
    starts = starts[starts < num_tokens].astype(np.int64)
    tokens = generator.integers(256, size=num_tokens).astype(np.uint16)
    tokens[starts] = BOUNDARY
    middle = starts[len(starts) // 3]
    return splits.make_split([tokens[:middle], tokens[middle:]],
                           [starts[starts < middle], starts[starts >= middle] - middle], 257)


def join(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name in FIELDS:
        assert torch.equal(left[name], right[name]), name


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_order_is_the_same_on_every_layout(data: st.DataObject) -> None:
    global_batch = data.draw(st.sampled_from([1, 6, 8, 12]))
    seq_len = data.draw(st.integers(1, 40))
    tokens = make_split(data.draw(st.integers(seq_len + 1, 400)))
    step, seed = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, 2**31 - 1))
    num_ranks = data.draw(st.sampled_from(divisors(global_batch)))
    micro_batch = data.draw(st.sampled_from(divisors(global_batch // num_ranks)))
    make = {"seq_len": seq_len, "global_batch": global_batch, "seed": seed}
    whole = Batches(tokens, **make).micro_batches(step, 0, 1, global_batch)
    assert len(whole) == 1
    used = Batches(tokens, **make)
    for earlier in range(max(0, step - 3), step):  # a run that comes by here, as against one that resumes here
        used.micro_batches(earlier, 0, 1, 1)
    parts = [used.micro_batches(step, rank, num_ranks, micro_batch) for rank in range(num_ranks)]
    assert all(batch.tokens.shape == (micro_batch, seq_len) for part in parts for batch in part)
    assert_same(join(whole), join([batch for part in parts for batch in part]))
    first = step * global_batch * seq_len
    assert whole[0].token_id.flatten().tolist() == list(range(first, first + global_batch * seq_len))


def test_tokens_targets_and_positions_against_a_loop() -> None:
    tokens, seq_len = make_split(1000), 7
    stream = tokens.window(0, 1000)[0].tolist()
    windows = {}
    for start in range(0, 1000 - seq_len, seq_len):
        positions: list[int] = []
        for offset in range(seq_len):
            positions.append(0 if offset == 0 or stream[start + offset] == BOUNDARY else positions[-1] + 1)
        row = (stream[start : start + seq_len], stream[start + 1 : start + seq_len + 1], positions)
        windows[str(row[0])] = row
    assert len(windows) == 999 // seq_len
    for step in range(20):
        batch = join(Batches(tokens, seq_len=seq_len, global_batch=10, seed=3).micro_batches(step, 0, 1, 5))
        for row in zip(*(batch[name].tolist() for name in FIELDS[:3]), strict=True):
            assert row == windows[str(row[0])]


def test_each_epoch_visits_each_window_once_in_another_order() -> None:
    tokens = make_split(1000)
    batches = Batches(tokens, seq_len=9, global_batch=16, seed=1)
    (count,) = batches.num_windows
    rows = [str(row) for step in range(25) for row in batches.micro_batches(step, 0, 1, 16)[0].tokens.tolist()]
    epochs = [rows[first : first + count] for first in range(0, len(rows) - count + 1, count)]
    assert count == 111
    assert len(epochs) == 3
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert set(Counter(epochs[0]).values()) == {1}
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Batches(tokens, seq_len=9, global_batch=16, seed=2).micro_batches(0, 0, 1, 16)[0].tokens.tolist()
    assert [str(row) for row in other] != rows[:16]


def test_each_stretch_of_a_run_goes_on_where_the_one_before_ended() -> None:
    """Other sizes of a step, then other lengths of a sequence: no sequence and no number comes twice."""
    tokens, start, numbers, rows = make_split(1000), Position(), [], []
    for global_batch, num_steps in ((4, 3), (10, 2), (2, 5)):
        batches = Batches(tokens, seq_len=9, global_batch=global_batch, seed=1, start=start)
        for step in range(start.step, start.step + num_steps):
            (batch,) = batches.micro_batches(step, 0, 1, global_batch)
            numbers += batch.token_id.flatten().tolist()
            rows += batch.tokens.tolist()
        start = batches.position(start.step + num_steps)
    assert (start.sequences, start.tokens) == (42, 42 * 9)
    whole = Batches(tokens, seq_len=9, global_batch=42, seed=1).micro_batches(0, 0, 1, 42)[0]
    assert rows == whole.tokens.tolist()
    scheduled = Batches(tokens, seq_len=9, global_batch=4, seed=1, batch_schedule=[(3, 10), (5, 2)])
    halfway = Batches(tokens, seq_len=9, global_batch=4, seed=1, batch_schedule=[(3, 10), (5, 2)],
                      start=scheduled.position(4))
    steps = [[row for rank in range(2) for one in each.micro_batches(step, rank, 2, 1) for row in one.tokens.tolist()]
             for each, first in ((scheduled, 0), (halfway, 4)) for step in range(first, 10)]
    assert [row for step in steps[:10] for row in step] == rows
    assert steps[4:10] == steps[10:]
    assert (scheduled.position(10), halfway.position(10)) == (start, start)
    other = Batches(tokens, seq_len=5, global_batch=3, seed=1, start=Position(start.step, 76, start.tokens))
    numbers += other.micro_batches(start.step + 1, 0, 1, 3)[0].token_id.flatten().tolist()
    assert numbers == [*range(42 * 9), *range(42 * 9 + 3 * 5, 42 * 9 + 6 * 5)]


def test_too_little_text_is_refused() -> None:
    Batches(make_split(17), seq_len=16, global_batch=1, seed=0)
    with pytest.raises(ConfigError, match=r"^data.seq_len=17 needs 18 tokens, .* hold 17: use data.seq_len=16 or less"):
        Batches(make_split(17), seq_len=17, global_batch=1, seed=0)
    with pytest.raises(ConfigError, match=r"name more text in data.files$"):
        Batches(make_split(1), seq_len=4, global_batch=1, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(1, 40), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_held_out_is_the_same_on_every_layout(
    num_tokens: int, seq_len: int, num_sequences: int, num_ranks: int, micro_batch: int
) -> None:
    tokens = make_split(num_tokens)
    stream = tokens.window(0, num_tokens)[0]
    make = {"seq_len": seq_len, "num_sequences": num_sequences}
    one = join(held_out_batches(tokens, **make, rank=0, num_ranks=1, micro_batch=1))
    parts = [held_out_batches(tokens, **make, rank=rank, num_ranks=num_ranks, micro_batch=micro_batch)
             for rank in range(num_ranks)]
    assert len({len(part) for part in parts}) == 1
    assert all(batch.tokens.shape == (micro_batch, seq_len) for part in parts for batch in part)
    many = join([batch for part in parts for batch in part])
    count = len(one["tokens"])
    assert_same(one, {name: value[:count] for name, value in many.items()})
    padding = one["token_id"] < 0
    for name, value in (("tokens", 0), ("targets", -100), ("positions", 0), ("token_id", -1)):
        assert (many[name][count:] == value).all()
        assert (one[name][padding] == value).all()
    assert (one["targets"][~padding] >= 0).all()
    assert one["token_id"][~padding].tolist() == [n for n, real in enumerate((~padding).flatten().tolist()) if real]
    whole = (num_tokens - 1) // seq_len
    assert count == min(num_sequences, -(-(num_tokens - 1) // seq_len))
    if count == num_sequences <= whole:
        assert not padding.any()
    else:  # all there is, in order
        assert one["tokens"][~padding].tolist() == stream[:-1].tolist()
        assert one["targets"][~padding].tolist() == stream[1:].tolist()


def test_held_out_windows_are_spread_evenly() -> None:
    numbers = np.arange(1001, dtype=np.uint16)
    tokens = splits.make_split([numbers], [np.zeros(1, dtype=np.int64)], 2000)
    (batch,) = held_out_batches(tokens, seq_len=10, num_sequences=4, rank=0, num_ranks=1, micro_batch=4)
    assert batch.tokens[:, 0].tolist() == [0, 250, 500, 750]
    assert batch.positions[3].tolist() == list(range(10))


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few to evaluate on"):
        held_out_batches(make_split(1), seq_len=4, num_sequences=1, rank=0, num_ranks=1, micro_batch=1)
