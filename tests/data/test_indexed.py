"""Megatron's files of tokens are read and written as Megatron does, and blended; damage is said in one line."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moescale.cli import app
from moescale.config import ConfigError, DataConfig, parse_config
from moescale.data.batches import Batches
from moescale.data.blend import Blend
from moescale.data.export import export
from moescale.data.indexed import write_indexed
from moescale.data.token_file import TokenCorpus, prepare_tokens
from moescale.data.tokenizer import ByteTokenizer, load_tokenizer
from moescale.engine.base import build_engine
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support import engines, splits

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")
STREAM = splits.make_split([np.zeros(30, dtype=np.uint16)], [np.zeros(1, dtype=np.int64)], 257)
TEXTS = [f"document {number} äö🙂 of many words " * (number % 5 + 1) for number in range(40)]


def write_texts(folder: Path, texts: list[str] = TEXTS) -> str:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text)
    return f"{folder}/*.txt"


def config_of(tmp_path: Path, *files: str, **keys: object) -> DataConfig:
    return DataConfig(files=files, cache_dir=str(tmp_path / "cache"), **{"held_out": 0.2, **keys})


def build(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    """Let Megatron write documents, each of some sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor([*chain(*sequences)], dtype=torch.int64), [len(one) for one in sequences])
    builder.finalize(f"{prefix}.idx")


def streams(corpus: TokenCorpus) -> list[list[list[int]]]:
    return [[document.tolist() for document in split.documents()] for split in (corpus.train, corpus.held_out)]


@needs_megatron
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("end", [True, False], ids=["end of document", "no end"])
def test_reads_what_megatron_writes(tmp_path: Path, dtype: type, end: bool) -> None:
    """Whatever the dtype, in sequences or whole, with empty documents, it is the text that it was made of."""
    encoded = [list(text.encode()) for text in TEXTS]
    documents = [[ids[:7], ids[7:9], ids[9:] + [256] * end] if number % 3 else [ids + [256] * end]
                 for number, ids in enumerate(encoded)]
    documents[5:5] = [[[256] if end else []], [[], []]]
    build(tmp_path / "theirs_document", documents, dtype)
    read = prepare_tokens(config_of(tmp_path, f"{tmp_path}/theirs_document.*"))
    text = prepare_tokens(config_of(tmp_path, write_texts(tmp_path / "text")))
    assert streams(read) == streams(text)
    assert [split.text_bytes for split in (read.train, read.held_out)] == [
        split.text_bytes for split in (text.train, text.held_out)]


@needs_megatron
@pytest.mark.parametrize("tokens", ["bytes", "one token", "two tokens"])
def test_megatron_reads_what_is_written(
    tmp_path: Path, tokens: str, train_tokenizer: Callable[..., Path], write_metaspace: Callable[..., Path]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = {"bytes": lambda: "bytes", "one token": lambda: train_tokenizer("tokenizer.json", "<|endoftext|>"),
                 "two tokens": lambda: write_metaspace("llama")}[tokens]()
    config = config_of(tmp_path, write_texts(tmp_path / "text"), tokenizer=str(tokenizer))
    corpus, used = prepare_tokens(config), load_tokenizer(str(tokenizer))
    assert (used.begin != used.end) == (tokens == "two tokens")
    list(export(config, tmp_path / "new" / "mine"))
    for name, split in (("train", corpus.train), ("held_out", corpus.held_out)):
        theirs = IndexedDataset(f"{tmp_path}/new/mine_{name}")
        ours = list(split.documents())
        if used.begin == used.end:
            ours = [np.roll(document, -1) for document in ours]
        assert [document.tolist() for document in theirs] == [document.tolist() for document in ours]
        assert theirs.document_indices.tolist() == list(range(len(ours) + 1))
        assert theirs.index.dtype == np.uint16
    back = prepare_tokens(config_of(tmp_path, f"{tmp_path}/new/mine_train.bin", tokenizer=str(tokenizer),
                                    held_out_files=(f"{tmp_path}/new/mine_held_out.idx",)))
    assert streams(back) == streams(corpus)


def test_large_vocabulary_has_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescale.data.tokenizer.ByteTokenizer.vocab_size", 65500)
    list(export(config_of(tmp_path, write_texts(tmp_path / "text")), tmp_path / "mine"))
    assert (tmp_path / "mine_train.idx").read_bytes()[17] == 4


def test_the_command_says_what_it_wrote(here: Path) -> None:
    words = ["data", "tiny.yaml", "tokens/mine", "data.files=['text/[0-3].txt', 'text/[4-7].txt']",
             "data.weights=[3, 1]", "data.cache_dir=cache"]
    (here / "text" / "0.txt").write_text("another text")
    (here / "text" / "4.txt").write_text("one more")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "--train-data-path 3 tokens/mine_train_0 1 tokens/mine_train_1 --valid-data-path tokens/mine_held_out" in (
        done.output)
    assert {path.name for path in (here / "tokens").iterdir()} == {
        f"mine_{name}.{ending}" for name in ("train_0", "train_1", "held_out") for ending in ("bin", "idx")}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2


# ---- damage


def change(path: Path, offset: int, kind: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, offset, value)
    path.write_bytes(content)


def cut(path: Path, number: int) -> None:
    path.write_bytes(path.read_bytes()[:-number])


DAMAGE = {  # of two files of three documents of four tokens
    "no mark": (lambda f: change(f / "a.idx", 0, "<B", 0), r"a\.idx is no index of Megatron's"),
    "empty index": (lambda f: (f / "a.idx").write_bytes(b""), r"a\.idx is no index"),
    "version": (lambda f: change(f / "a.idx", 9, "<Q", 2), "has version 2"),
    "floating point": (lambda f: change(f / "a.idx", 17, "<B", 7), "tokens have dtype 7"),
    "another dtype": (lambda f: change(f / "a.idx", 17, "<B", 4), "do not lie one after another"),
    "more sequences": (lambda f: change(f / "a.idx", 18, "<Q", 2**60), "its header describes"),
    "modes": (lambda f: (f / "a.idx").write_bytes((f / "a.idx").read_bytes() + b"\0" * 3), "of several media"),
    "cut index": (lambda f: cut(f / "a.idx", 1), "its header describes"),
    "negative length": (lambda f: change(f / "a.idx", 34, "<i", -4), "do not lie one after another"),
    "bounds": (lambda f: change(f / "a.idx", 34 + 36 + 8, "<q", 3), "not all of its sequences in a row"),
    "cut tokens": (lambda f: cut(f / "a.bin", 2), r"a\.bin has 22 bytes, and .*a\.idx describes 24 of uint16"),
    "no index": (lambda f: (f / "a.idx").unlink(), r"a\.bin needs a\.idx beside it"),
    "no tokens": (lambda f: (f / "a.bin").unlink(), r"a\.idx needs a\.bin beside it"),
    "another tokenizer": (lambda f: change(f / "a.bin", 8, "<H", 300),
                          r"a\.bin document 2 holds the token 300, and data\.tokenizer=bytes has 257 ids"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_in_one_line(tmp_path: Path, damage: str) -> None:
    write_three(tmp_path / "a")
    prepare_tokens(config_of(tmp_path, f"{tmp_path}/a.bin"))
    spoil, words = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=words) as error:
        prepare_tokens(config_of(tmp_path, *(str(path) for path in tmp_path.glob("a.*"))))
    assert "\n" not in str(error.value)


def test_a_special_token_is_named(tmp_path: Path, write_metaspace: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(write_metaspace("llama", {"<|turn|>": True})))
    documents = [np.array([tokenizer.begin, 260, index, tokenizer.end]) for index in (261, tokenizer.num_ids - 1)]
    write_indexed(tmp_path / "a", documents, tokenizer)
    config = config_of(tmp_path, f"{tmp_path}/a.bin", tokenizer=tokenizer.name)
    with pytest.raises(ConfigError, match=r"document 2 holds the special token <\|turn\|>: leave it out, or write"):
        prepare_tokens(config)
    assert sum(map(len, streams(prepare_tokens(config.model_copy(update={"bad_documents": "skip"}))))) == 2


def write_three(prefix: Path) -> None:
    """Write three documents of four tokens by the format's description alone."""
    tokens = np.array([*b"one", 256, *b"two", 256, *b"six", 256], dtype="<u2")
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 4) + struct.pack("<3i", 4, 4, 4)
        + struct.pack("<3q", 0, 8, 16) + struct.pack("<4q", 0, 1, 2, 3))


def test_a_name_without_its_ending(tmp_path: Path) -> None:
    write_three(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no such file: .*/a: write .*/a\.bin"):
        prepare_tokens(config_of(tmp_path, f"{tmp_path}/a"))


def test_another_index_is_another_text(tmp_path: Path) -> None:
    write_three(tmp_path / "a")
    config = config_of(tmp_path, f"{tmp_path}/a.bin")
    before = prepare_tokens(config)
    change(tmp_path / "a.idx", 34 + 36 + 8, "<q", 2)  # the first two sequences are one document
    (tmp_path / "a.idx").write_bytes(
        (tmp_path / "a.idx").read_bytes()[:26] + struct.pack("<Q", 3) + (tmp_path / "a.idx").read_bytes()[34:70]
        + struct.pack("<3q", 0, 2, 3))
    after = prepare_tokens(config)
    assert sum(map(len, streams(before))) == 3
    assert sum(map(len, streams(after))) == 2


def test_one_document_is_cut_in_two(tmp_path: Path) -> None:
    text = "only one document, of which the end is held out" * 3
    path = write_texts(tmp_path / "text", [text])
    tokens = np.array([*text.encode(), 256], dtype="<u2")
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    (tmp_path / "a.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2)
                                     + struct.pack("<iqqq", len(tokens), 0, 0, 1))
    assert streams(prepare_tokens(config_of(tmp_path, f"{tmp_path}/a.bin"))) == streams(
        prepare_tokens(config_of(tmp_path, path)))


# ---- blends


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 200))
def test_a_blend_has_its_shares_wherever_one_looks(weights: list[float], number: int) -> None:
    blend = Blend((STREAM,) * len(weights), ("",) * len(weights), tuple(weights))
    counts, shares = [0] * len(weights), blend.shares
    for sequence in range(number):
        due = [(count + 0.5) / share for count, share in zip(counts, shares, strict=True)]
        part, before = blend.place(sequence)
        assert due[part] == min(due)
        assert before == counts[part]
        counts[part] += 1
    assert blend.counts(number) == counts
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - number * share) <= max(1, len(weights) / 2)


@needs_megatron
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.5), (1, 2, 3, 4), (0.9, 0.05, 0.03, 0.02)])
def test_a_blend_has_megatrons_shares(weights: tuple[float, ...]) -> None:
    from megatron.core.datasets import helpers

    count = 2000
    theirs, numbers = np.zeros(count, dtype=np.int16), np.zeros(count, dtype=np.int64)
    blend = Blend((STREAM,) * len(weights), ("",) * len(weights), weights)
    helpers.build_blending_indices(theirs, numbers, np.array(blend.shares), len(weights), count, False)
    ours = np.array([blend.place(number)[0] for number in range(count)])
    for part in range(len(weights)):
        apart = np.cumsum(ours == part) - np.cumsum(theirs == part)
        assert np.abs(apart).max() <= 2  # each of the two is within the next few of its share


def test_batches_of_a_blend(tmp_path: Path) -> None:
    """Each stream is seen in its own epochs, and the order does not depend on where a run begins."""
    parts = tuple(splits.make_split([np.arange(first, first + length, dtype=np.uint16)], [np.zeros(1, dtype=np.int64)],
                                    2**16) for first, length in ((1000, 41), (2000, 101)))
    blend = Blend(parts, ("a", "b"), (3.0, 1.0))
    batches = Batches(blend, seq_len=10, global_batch=8, seed=1)
    seen = [int(first) for step in range(20)
            for first in batches.micro_batches(step, 0, 1, 8)[0].tokens[:, 0]]  # 160 sequences
    first, second = [each for each in seen if each < 2000], [each for each in seen if each >= 2000]
    assert (len(first), len(second)) == (120, 40)
    for epoch in range(30):
        assert sorted(first[epoch * 4 : epoch * 4 + 4]) == [1000, 1010, 1020, 1030]
    for epoch in range(4):
        assert sorted(second[epoch * 10 : epoch * 10 + 10]) == [2000 + 10 * number for number in range(10)]
    later = Batches(blend, seq_len=10, global_batch=8, seed=1).micro_batches(13, 1, 2, 4)[0].tokens[:, 0].tolist()
    assert later == seen[13 * 8 + 4 : 14 * 8]
    assert batches.epochs(20) == 30
    with pytest.raises(ConfigError, match=r"the training documents of a hold 41: use data\.seq_len=40"):
        Batches(blend, seq_len=60, global_batch=8, seed=1)


def test_a_blend_of_texts_and_tokens(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text")
    list(export(config_of(tmp_path, text), tmp_path / "a"))
    files = (f"{tmp_path}/a_train.bin", f"{tmp_path}/text/0*.txt")
    corpus = prepare_tokens(config_of(tmp_path, *files, weights=(1, 3)))
    assert corpus.blend is not None
    one, two = (prepare_tokens(config_of(tmp_path, file, held_out_files=(f"{tmp_path}/a_held_out.bin",)))
                for file in files)
    assert [[document.tolist() for document in part.documents()] for part in corpus.blend.parts] == [
        streams(one)[0], streams(two)[0]]
    assert "data.weights takes 25.000% of the sequences from" in corpus.notes[0]
    assert prepare_tokens(config_of(tmp_path, *files, weights=(2, 6))).fingerprint == corpus.fingerprint
    assert prepare_tokens(config_of(tmp_path, *files, weights=(1, 2))).fingerprint != corpus.fingerprint


@pytest.mark.parametrize("weights", [[0.5], [1, 2, 3], [1, 0], [2, -1]])
def test_weights_that_cannot_be(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights.*2 entries of data\.files"):
        parse_config({"data": {"files": ["a.txt", "b.txt"], "weights": weights}}, "test")


# ---- training


def train(folder: Path, *texts: list[str]) -> list[list[float]]:
    """Train some steps on each blend of two texts under each engine. -> the losses"""
    losses: list[list[float]] = []
    mesh = start_mesh(engines.make_config("dropless", {"ep": 2}))
    for name in ("native", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])):
        for files in texts:
            blend = prepare_tokens(config_of(folder, *files, weights=(2.0, 1.0))).blend
            assert blend is not None
            batches = Batches(blend, seq_len=engines.SEQ, global_batch=engines.GLOBAL_BATCH, seed=3)
            engine = build_engine(engines.make_config("dropless", {"ep": 2}, engine=name), mesh)
            losses.append([])
            for step in range(2):
                part = batches.micro_batches(step, mesh.batch_rank, mesh.batch_size, 2)
                losses[-1].append(float(engine.forward_backward(part).cross_entropy))
                engine.step()
    stop_mesh()
    return losses


def test_training_on_tokens_is_training_on_their_text(tmp_path: Path) -> None:
    text, tokens = [], []
    for name, texts in (("a", TEXTS[::2]), ("b", TEXTS[1::2])):
        text.append(write_texts(tmp_path / name, texts))
        tokens.append(f"{tmp_path}/tokens_{name}.bin")
        write_indexed(tmp_path / f"tokens_{name}", (np.array([256, *each.encode()]) for each in texts), ByteTokenizer())
    losses = run_ranks(2, train, tmp_path, text, tokens)[0]
    assert losses[1::2] == losses[::2]
