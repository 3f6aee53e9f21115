"""A cache holds exactly its corpus, is written once, and is whole or absent whatever happens on the way."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescale.config import ConfigError, DataConfig
from moescale.data import token_file
from moescale.data.corpus import open_corpus, split_documents
from moescale.data.publish import publish, temporary_beside
from moescale.data.token_file import TokenSplit, prepare_tokens
from moescale.data.tokenizer import load_tokenizer, with_boundaries


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """A corpus of sixty files, some with characters of many bytes, and a cache."""
    (tmp_path / "text").mkdir()
    for number in range(60):
        ending = ("txt", "py", "md")[number % 3]
        (tmp_path / "text" / f"{number:02}.{ending}").write_text(f"document {number} äö🙂 " * (number % 7 + 1))
    return DataConfig(files=(f"{tmp_path}/text/*.*",), cache_dir=str(tmp_path / "cache"), held_out=0.1)


def all_tokens(split: TokenSplit) -> list[int]:
    return split.window(0, split.num_tokens)[0].tolist()


def check_whole(config: DataConfig) -> None:
    """Compare the cache with its corpus, token by token."""
    tokens, tokenizer = prepare_tokens(config), load_tokenizer(config.tokenizer)
    documents = list(split_documents(open_corpus(config.files).documents(), config.held_out))
    for name, split in (("train", tokens.train), ("held_out", tokens.held_out)):
        texts = [document.text for part, document in documents if part == name]
        kinds = [document.kind for part, document in documents if part == name]
        expected = [with_boundaries(tokenizer, ids, np.dtype(np.int64)).tolist()
                    for ids in tokenizer.encode_batch(texts)]
        assert all_tokens(split) == [index for document in expected for index in document]
        assert split.starts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
        assert split.kinds_of(0, split.num_tokens) == [kind for kind, document in zip(kinds, expected, strict=True)
                                                       for _ in document]
        assert split.text_bytes == len("".join(texts).encode())
        assert split.num_documents == len(texts) > 0


def snapshot(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix != ".lock"}


def test_holds_the_corpus_over_many_shards(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "SHARD_TOKENS", 100)
    monkeypatch.setattr(token_file, "CHUNK_CHARACTERS", 300)
    check_whole(config)
    train = prepare_tokens(config).train
    assert len(train.shards) == -(-train.num_tokens // 100)
    assert train.shards[0].dtype == np.uint16
    tokens, starts = all_tokens(train), set(train.starts.tolist())
    generator = np.random.default_rng(0)
    for _ in range(200):
        start = int(generator.integers(train.num_tokens - 1))
        length = int(generator.integers(1, min(500, train.num_tokens - start) + 1))
        expected, position = [], -1
        for index in range(start, start + length):
            position = 0 if index in starts else position + 1
            expected.append(position)
        ids, positions = train.window(start, length)
        assert ids.tolist() == tokens[start : start + length]
        assert positions.tolist() == expected
        assert ids.dtype == positions.dtype == np.int64


def test_hugging_face_tokens(config: DataConfig, train_tokenizer: Callable[..., Path]) -> None:
    path = train_tokenizer("tokenizer.json", "<|endoftext|>")
    config = config.model_copy(update={"tokenizer": str(path)})
    check_whole(config)
    assert prepare_tokens(config).train.vocab_size > 257


def test_large_vocabulary_is_kept_in_32_bits(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescale.data.tokenizer.ByteTokenizer.vocab_size", 2**16 + 1)
    assert prepare_tokens(config).train.shards[0].dtype == np.uint32
    check_whole(config)


def test_one_document_is_cut(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ä" * 100)
    tokens = prepare_tokens(config.model_copy(update={"files": (str(tmp_path / "one.txt"),)}))
    assert (tokens.train.text_bytes, tokens.held_out.text_bytes) == (180, 20)
    assert all_tokens(tokens.held_out)[0] == 256


def test_cache_is_reused_and_renewed(config: DataConfig, tmp_path: Path) -> None:
    first = prepare_tokens(config)
    before = snapshot(first.directory.parent)
    assert prepare_tokens(config).directory == first.directory
    assert snapshot(first.directory.parent) == before
    file = tmp_path / "text" / "06.txt"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert prepare_tokens(config).directory != first.directory
    file.write_text("changed")
    check_whole(config)
    directories = {prepare_tokens(config.model_copy(update={"held_out": share})).directory for share in (0.1, 0.2, 0.3)}
    assert len(directories) == 3


def test_fingerprint_is_of_the_tokens_and_the_split_alone(config: DataConfig, tmp_path: Path) -> None:
    first = prepare_tokens(config).fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "text", moved / "text")
    other = config.model_copy(update={"files": (f"{moved}/text/*.*",), "cache_dir": str(moved / "cache")})
    assert prepare_tokens(other).fingerprint == first
    assert prepare_tokens(other.model_copy(update={"held_out": 0.3})).fingerprint != first
    text = (moved / "text" / "06.txt").read_text()
    (moved / "text" / "06.txt").write_text(text[:-1] + "x")
    assert prepare_tokens(other).fingerprint != first


@pytest.mark.parametrize("name", ["train-00000.bin", "held_out-starts.bin", "train-kinds.bin", "meta.json"])
def test_damaged_cache_is_rewritten(config: DataConfig, name: str) -> None:
    directory = prepare_tokens(config).directory
    with open(directory / name, "r+b") as file:
        file.truncate(10)
    check_whole(config)
    (directory / name).unlink()
    check_whole(config)
    shutil.rmtree(directory)
    directory.write_text("a file where the folder should be")
    check_whole(config)


def test_more_kinds_than_a_byte_holds_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "CHUNK_CHARACTERS", 50)
    lines = [json.dumps({"text": f"{number:05}", "source": f"s{number}"}) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokens = prepare_tokens(DataConfig(files=(f"{tmp_path}/a.jsonl",), cache_dir=str(tmp_path / "cache"), held_out=0.3))
    for split in (tokens.train, tokens.held_out):
        numbers = [int(bytes(split.window(start + 1, 5)[0].tolist())) for start in split.starts.tolist()]
        assert split.kinds_of(0, split.num_tokens)[::6] == [f"s{n}" if n < 255 else "other" for n in numbers]
        assert split.kinds.dtype == np.uint8


def test_token_beyond_the_vocabulary_is_refused(config: DataConfig) -> None:
    tokens = prepare_tokens(config)
    shard = np.memmap(tokens.directory / "train-00000.bin", dtype=np.uint16, mode="r+")
    shard[5] = 257
    shard.flush()
    with pytest.raises(ConfigError, match=r"holds the token 257, where 256 is the last: .*delete this folder"):
        tokens.train.window(0, 10)


def _prepare_at_once(config: DataConfig, barrier: Any, results: Any) -> None:
    barrier.wait()
    tokens = prepare_tokens(config)
    results.put((str(tokens.directory), tokens.train.num_tokens, all_tokens(tokens.held_out)))


def _locks_do_not_work(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", [True, False])
def test_many_writers_at_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    if not locks:
        monkeypatch.setattr("fcntl.flock", _locks_do_not_work)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_prepare_at_once, args=(config, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert seen[1:] == seen[:-1]
    assert [path for path in Path(config.cache_dir).iterdir() if path.suffix != ".lock"] == [Path(seen[0][0])]
    check_whole(config)


def test_lost_race_keeps_the_winner(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "winner").touch()
    temporary = temporary_beside(place)
    temporary.mkdir()
    publish(temporary, place, lambda: True)
    assert (place / "winner").exists()


def _prepare_slowly(config: DataConfig) -> None:
    original = token_file._SplitWriter.finish

    def wait(writer: Any) -> dict[str, Any]:
        time.sleep(60)
        return original(writer)

    token_file._SplitWriter.finish = wait  # type: ignore[method-assign]
    prepare_tokens(config)


def test_killed_writer_leaves_nothing_in_the_way(config: DataConfig) -> None:
    process = multiprocessing.get_context("fork").Process(target=_prepare_slowly, args=(config,))
    process.start()
    cache = Path(config.cache_dir)
    deadline = time.monotonic() + 20
    while not list(cache.glob("*.tmp/train-00000.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(cache.glob("*.tmp"))
    check_whole(config)
    assert not list(cache.glob("*.tmp"))


class _FullDisk(io.BytesIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_is_one_line_and_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(token_file, "open", lambda *_: _FullDisk(), raising=False)
        with pytest.raises(ConfigError) as caught:
            prepare_tokens(config)
    message = str(caught.value)
    assert message.startswith(f"data.cache_dir={config.cache_dir}: cannot write tokens to")
    assert "No space left on device" in message
    assert "\n" not in message
    assert [path.suffix for path in Path(config.cache_dir).iterdir()] == [".lock"]
    check_whole(config)


def test_refused_corpus_leaves_nothing(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "text" / "57.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"57\.txt is not UTF-8"):
        prepare_tokens(config)
    assert [path.suffix for path in Path(config.cache_dir).iterdir()] == [".lock"]


def test_cache_that_is_no_directory(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^data\.cache_dir=.*cannot write tokens to"):
        prepare_tokens(config.model_copy(update={"cache_dir": str(tmp_path / "file")}))


def test_default_corpus(tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path))
    tokens = prepare_tokens(config)
    assert tokens.train.num_tokens == tokens.train.text_bytes + tokens.train.num_documents > 10**6
    assert load_tokenizer("bytes").decode(tokens.train.window(0, 5000)[0])
