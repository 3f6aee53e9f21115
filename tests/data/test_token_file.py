"""A cache holds exactly its corpus, is written once, and is whole or absent whatever happens on the way."""

import errno
import hashlib
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
from moescale.data import cache as cache_module
from moescale.data import pack as pack_module
from moescale.data import token_file
from moescale.data.corpus import open_corpus
from moescale.data.split import TokenSplit
from moescale.data.token_file import prepare_tokens
from moescale.data.tokenizer import ByteTokenizer, load_tokenizer, with_boundaries
from moescale.files.publish import publish, temporary_beside


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


def starts_of(split: TokenSplit) -> list[int]:
    return np.flatnonzero(split.window(0, split.num_tokens)[1] == 0).tolist()


def is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < share * 2**64


def check_whole(config: DataConfig) -> None:
    """Compare the cache with its corpus, token by token."""
    tokens, tokenizer = prepare_tokens(config), load_tokenizer(config.tokenizer)
    documents = list(open_corpus(config.files).documents())
    for held_out, split in ((False, tokens.train), (True, tokens.held_out)):
        chosen = [each for each in documents if is_held_out(each.text, config.held_out) == held_out]
        expected = [with_boundaries(tokenizer, ids, np.dtype(np.int64)).tolist()
                    for ids in tokenizer.encode_batch([document.text for document in chosen])]
        assert all_tokens(split) == [index for document in expected for index in document]
        assert starts_of(split) == np.cumsum([0, *map(len, expected)])[:-1].tolist()
        kinds = [[document.kind] * len(ids) for document, ids in zip(chosen, expected, strict=True)]
        assert split.kinds_of(0, split.num_tokens) == [kind for some in kinds for kind in some]
        assert split.text_bytes == len("".join(document.text for document in chosen).encode())
        assert split.num_documents == len(chosen) > 0


def snapshot(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (cache / "packs").rglob("*")}


def packs_of(config: DataConfig) -> list[Path]:
    return sorted(Path(config.cache_dir, "packs").iterdir())


def test_holds_the_corpus_over_many_packs(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "PACK_BYTES", 200)
    monkeypatch.setattr(token_file, "CHUNK_CHARACTERS", 30)
    monkeypatch.setattr(pack_module, "BLOCK_TOKENS", 7)
    check_whole(config)
    train = prepare_tokens(config).train
    assert len(train.packs) > 20
    assert train.packs[0].tokens.dtype == np.uint16
    tokens, starts = all_tokens(train), set(starts_of(train))
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
    assert prepare_tokens(config).train.packs[0].vocab_size > 257


def test_large_vocabulary_is_kept_in_32_bits(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescale.data.tokenizer.ByteTokenizer.vocab_size", 2**16 + 1)
    assert prepare_tokens(config).train.packs[0].tokens.dtype == np.uint32
    check_whole(config)


def test_nothing_unchanged_is_read_twice(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only new content is tokenized, whatever times, sizes and names files have."""
    tokenized: list[str] = []
    encode = ByteTokenizer.encode_batch
    monkeypatch.setattr(ByteTokenizer, "encode_batch",
                        lambda self, texts: tokenized.extend(texts) or encode(self, texts))
    monkeypatch.setattr(token_file, "PACK_BYTES", 500)  # several files in each of several packs
    prepare_tokens(config)
    before, count = snapshot(Path(config.cache_dir)), len(tokenized)
    for path in (tmp_path / "text").iterdir():
        path.touch()
    for share in (0.1, 0.2, 0.3):
        prepare_tokens(config.model_copy(update={"held_out": share}))
    assert snapshot(Path(config.cache_dir)) == before
    file = tmp_path / "text" / "06.txt"
    status, text = file.stat(), file.read_text().replace("document", "tnemucod")
    file.write_text(text)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a restored backup has it
    (tmp_path / "text" / "00.txt").rename(tmp_path / "text" / "61.txt")
    (tmp_path / "text" / "02.md").unlink()
    prepare_tokens(config)
    assert tokenized[count:] == [text]
    monkeypatch.undo()
    check_whole(config)


def test_what_was_tokenized_before_a_fault_is_kept(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "PACK_BYTES", 200)
    (tmp_path / "text" / "50.md").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"50\.md is not UTF-8.*bad_documents"):
        prepare_tokens(config)
    kept = snapshot(Path(config.cache_dir))
    assert len(kept) > 20
    corpus = prepare_tokens(config.model_copy(update={"bad_documents": "skip"}))
    assert kept.items() <= snapshot(Path(config.cache_dir)).items()
    assert "50.md" in corpus.notes[0]
    assert corpus.notes[0].startswith("1 ")
    with pytest.raises(ConfigError, match=r"50\.md is not UTF-8"):  # though its pack is there
        prepare_tokens(config)


def test_large_corpus_is_not_hashed_again(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a size, files that the system says nobody touched are not read; a change is seen all the same."""
    hashed: list[str] = []
    original = cache_module.content_hash
    monkeypatch.setattr(cache_module, "content_hash", lambda file: hashed.append(file.path) or original(file))
    monkeypatch.setattr(cache_module, "HASHED_AT_START_BYTES", 1000)
    file = tmp_path / "text" / "06.txt"
    first = prepare_tokens(config).fingerprint
    assert len(hashed) == 60
    prepare_tokens(config)
    assert len(hashed) == 120, "files this young may change again within one tick of the clock"
    monkeypatch.setattr(cache_module, "SETTLED_NS", 0)
    prepare_tokens(config)
    hashed.clear()
    prepare_tokens(config)
    assert hashed == []
    status = file.stat()
    time.sleep(0.02)
    file.write_text(file.read_text().replace("document", "tnemucod"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare_tokens(config).fingerprint != first
    assert hashed == [str(file)]


def test_file_that_changes_while_it_is_read_is_refused(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = token_file.read_documents

    def change(file: Any, *rest: Any) -> Any:
        yield from original(file, *rest)
        with open(file.path, "a") as end:
            end.write("more")

    monkeypatch.setattr(token_file, "read_documents", change)
    with pytest.raises(ConfigError, match=r"00\.txt was changed"):
        prepare_tokens(config)
    monkeypatch.undo()
    check_whole(config)


NAMES = ("tokens", "starts", "texts", "text_bytes", "kinds", "blocks", "meta")


def test_damaged_list_of_packs_is_written_anew(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "HASHED_AT_START_BYTES", 0)
    monkeypatch.setattr(cache_module, "SETTLED_NS", 0)
    first = prepare_tokens(config).fingerprint
    (path,) = Path(config.cache_dir, "corpora").glob("*/packs.json")
    whole = path.read_bytes()
    assert b"06.txt" in whole
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(generator.integers(8))]) + whole[place + 1:])
        assert prepare_tokens(config).fingerprint == first
        assert path.read_bytes() == whole
    path.write_bytes(b"[" * 10**6)  # nested too deeply for Python's reader
    assert prepare_tokens(config).fingerprint == first
    path.write_bytes(b"")
    other = config.model_copy(update={"files": (f"{tmp_path}/text/*.md",)})
    prepare_tokens(other)  # which cleans up
    assert len(packs_of(config)) == 1
    check_whole(config)


@pytest.mark.parametrize(("terminal", "encoding"), [(False, "utf-8"), (True, "utf-8"), (True, "ascii")])
def test_progress_names_the_file_and_never_ends_the_work(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, terminal: bool, encoding: str
) -> None:
    class Screen(io.TextIOWrapper):
        def isatty(self) -> bool:
            return terminal

    shown = io.BytesIO()
    monkeypatch.setattr("sys.stderr", Screen(shown, encoding=encoding, write_through=True))
    for name in ("FIRST_SECONDS", "LINE_SECONDS", "BAR_SECONDS"):
        monkeypatch.setattr(f"moescale.data.progress.{name}", 0.0)
    monkeypatch.setattr(token_file, "CHUNK_CHARACTERS", 1)
    lines = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(60))
    path = Path(config.cache_dir).with_name("lines.jsonl")
    path.write_text(lines)
    config = config.model_copy(update={"files": (str(path),)})
    prepare_tokens(config)
    assert b"tokenizing" in shown.getvalue()
    assert path.name.encode() in shown.getvalue()
    shutil.rmtree(config.cache_dir)
    closed = Screen(io.BytesIO())
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    check_whole(config)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_cache_is_rewritten(config: DataConfig, name: str) -> None:
    prepare_tokens(config)
    (directory,) = packs_of(config)
    path = directory / (f"{name}.json" if name == "meta" else f"{name}.bin")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 20):  # a flipped bit is found wherever it is
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(generator.integers(8))]) + whole[place + 1:])
        prepare_tokens(config)
        assert path.read_bytes() == whole
    with open(path, "r+b") as file:
        file.truncate(10)
    check_whole(config)
    path.write_bytes(b"[" * 10**6)  # nested too deeply for Python's reader
    check_whole(config)
    path.unlink()
    check_whole(config)
    shutil.rmtree(directory)
    directory.write_text("a file where the folder should be")
    check_whole(config)


def test_damage_that_comes_later_is_refused_and_then_mended(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "BLOCK_TOKENS", 50)
    prepare_tokens(config)
    monkeypatch.setattr(token_file, "CHECKED_AT_START_BYTES", 100)  # of tokens of two bytes: the first block alone
    (directory,) = packs_of(config)
    with open(directory / "tokens.bin", "r+b") as file:
        file.seek(180)
        file.write(b"x")
    tokens = prepare_tokens(config)
    assert tokens.train.packs[0].read(0, 50).tolist() == tokens.train.packs[0].tokens[:50].tolist()
    with pytest.raises(ConfigError, match=r"damaged on the disk.*start again"):
        tokens.train.packs[0].read(49, 120)
    monkeypatch.undo()
    check_whole(config)


def start_and_hold(config: DataConfig, pipe: Any) -> None:
    """Prepare tokens in another process, say so, and hold on to them until told to end."""
    tokens = prepare_tokens(config)
    pipe.send(tokens.fingerprint)
    pipe.recv()
    pipe.send(all_tokens(tokens.train))


def test_old_content_is_removed_when_nobody_uses_it(config: DataConfig, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=start_and_hold, args=(config, there))
    process.start()
    here.recv()
    (used,) = packs_of(config)
    foreign = Path(config.cache_dir) / "packs" / "mine"
    foreign.mkdir()
    for number in range(3):
        (tmp_path / "text" / "06.txt").write_text(f"content {number}")
        check_whole(config)
        assert len(packs_of(config)) == 3, "the one in use, the newest, and what is not ours"
    assert used in packs_of(config)
    here.send("end")
    assert here.recv()
    process.join()
    (tmp_path / "text" / "06.txt").write_text("the last content")
    other = config.model_copy(update={"files": (f"{tmp_path}/text/*.md",)})
    prepare_tokens(other)
    check_whole(config)
    assert used not in packs_of(config)
    assert len(packs_of(config)) == 3, "one of each corpus, and what is not ours"
    for place in Path(config.cache_dir, "corpora").iterdir():
        os.utime(place / "packs.json", (0, time.time() - 86400 * (cache_module.KEPT_DAYS + 1)))
    (tmp_path / "text" / "06.txt").write_text("content of a month later")
    check_whole(config)
    assert len(packs_of(config)) == 2, "what is not ours, and one"


def test_more_kinds_than_a_byte_holds_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "CHUNK_CHARACTERS", 50)
    lines = [json.dumps({"text": f"{number:05}", "source": f"s{number}"}) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokens = prepare_tokens(DataConfig(files=(f"{tmp_path}/a.jsonl",), cache_dir=str(tmp_path / "cache"), held_out=0.3))
    for split in (tokens.train, tokens.held_out):
        numbers = [int(bytes(split.window(start + 1, 5)[0].tolist())) for start in starts_of(split)]
        assert split.kinds_of(0, split.num_tokens)[::6] == [f"s{n}" if n < 255 else "other" for n in numbers]


def test_token_beyond_the_vocabulary_is_refused(config: DataConfig) -> None:
    tokens = prepare_tokens(config)
    (directory,) = packs_of(config)
    shard = np.memmap(directory / "tokens.bin", dtype=np.uint16, mode="r+")
    shard[5] = 257  # after it was checked
    shard.flush()
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*damaged.*start again"):
        tokens.train.window(0, 10)


def _prepare_at_once(config: DataConfig, barrier: Any, results: Any) -> None:
    barrier.wait()
    tokens = prepare_tokens(config)
    results.put((tokens.fingerprint, tokens.train.num_tokens, all_tokens(tokens.held_out)))


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
    assert len(packs_of(config)) == 1, "and nothing temporary beside it"
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
    pack_module.PackWriter.finish = lambda writer: time.sleep(60)  # type: ignore[method-assign]
    prepare_tokens(config)


def test_killed_writer_leaves_nothing_in_the_way(config: DataConfig) -> None:
    process = multiprocessing.get_context("fork").Process(target=_prepare_slowly, args=(config,))
    process.start()
    cache = Path(config.cache_dir)
    deadline = time.monotonic() + 20
    while not list(cache.glob("packs/*.tmp/tokens.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(cache.glob("packs/*.tmp"))
    check_whole(config)
    assert not list(cache.rglob("*.tmp"))


class _FullDisk(io.BytesIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_is_one_line_and_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "open", lambda *_: _FullDisk(), raising=False)
        with pytest.raises(ConfigError) as caught:
            prepare_tokens(config)
    message = str(caught.value)
    assert message.startswith(f"data.cache_dir={config.cache_dir}: cannot write tokens to")
    assert "No space left on device" in message
    assert "\n" not in message
    assert packs_of(config) == []
    check_whole(config)


def test_refused_corpus_leaves_nothing(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "text" / "57.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"57\.txt is not UTF-8"):
        prepare_tokens(config)
    assert packs_of(config) == []


def test_cache_that_is_no_directory(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^data\.cache_dir=.*cannot write tokens to"):
        prepare_tokens(config.model_copy(update={"cache_dir": str(tmp_path / "file")}))


def test_default_corpus(tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path))
    tokens = prepare_tokens(config)
    assert tokens.train.num_tokens == tokens.train.text_bytes + tokens.train.num_documents > 10**6
    assert load_tokenizer("bytes").decode(tokens.train.window(0, 5000)[0])
