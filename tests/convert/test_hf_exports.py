"""What other programs find in an export: a tokenizer with the same ids, tokens that begin and end, what came along."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moescale
from moescale.checkpoint.store import save_checkpoint
from moescale.cli import app
from moescale.config import Config
from moescale.convert.companions import bytes_sentencepiece
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from moescale.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.support.models import DENSE, make_config, make_tensors, write_run
from tests.support.tokenizers import write_metaspace

SETTINGS = {
    "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 77,
                                         "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}),
    "generation_config.json": json.dumps({"bos_token_id": 1, "eos_token_id": [2, 9], "temperature": 0.7}),
    "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
    "chat_template.jinja": "{{ messages[0].content }}{{ eos_token }}",
}


def call(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def with_tokenizer(config: Config, tokenizer: object) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})


def write_run_with(run_dir: Path, tokenizer: Path, **data: object) -> Path:
    """Write a run as training does, with the files that its tokenizer has beside it. data: further keys."""
    config = with_tokenizer(make_config({**DENSE, "window": None, "vocab_size": 280}), str(tokenizer))
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    files = {"config.yaml": config.to_yaml(), **load_tokenizer(str(tokenizer)).files}
    save_checkpoint(run_dir, 0, make_tensors(config), {"seed": 0}, files, keep=1)
    return run_dir


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    convert(open_source(write_run(folder / "run", make_config({"window": None}))), folder / "hf", "hf", FileLayout())
    return folder / "hf"


def characters() -> list[str]:
    """Every character but the halves of a pair, which are no text; in pieces of many lengths and orders."""
    every = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    texts = ["".join(every[begin : begin + 4096]) for begin in range(0, len(every), 4096)]
    draw = random.Random(0)
    texts += ["".join(draw.choice(every) for _ in range(draw.randrange(40))) for _ in range(300)]
    return [*texts, "", " ", "  a  b ", "\r\n\t\n", "\0", "a<|endoftext|>b", "<0x41>", "e\u0301\u00e9", "\u2581"]


def test_bytes_are_the_same_ids_in_transformers(of_bytes: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(of_bytes), ByteTokenizer()
    texts = characters()
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert theirs(text)["input_ids"] == ids.tolist()
    assert theirs.decode([72, 256, 105], skip_special_tokens=True) == "Hi"
    draw = random.Random(1)
    for _ in range(300):  # what a model may write is no text
        ids = [draw.randrange(256) for _ in range(draw.randrange(1, 12))]
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 256)
    assert theirs.model_max_length == make_config().data.seq_len


def test_an_export_of_bytes_is_bytes_again(of_bytes: Path, tmp_path: Path) -> None:
    assert open_source(of_bytes).config.data.tokenizer == "bytes"
    call("convert", of_bytes, tmp_path / "megatron", "--to", "megatron")
    assert open_source(tmp_path / "megatron").config.data.tokenizer == "bytes"


def test_what_llama_cpp_reads_of_bytes() -> None:
    """Its pieces by their ids: the mark of a space where the space is, the boundary as a token that no text has."""
    content, pieces, place = bytes_sentencepiece(), [], 0
    while content[place] == 0x0A:
        length = content[place + 1]
        piece = content[place + 2 : place + 2 + length]
        pieces.append((piece[2 : 2 + piece[1]].decode(), piece[-1]))
        place += 2 + length
    assert [name for name, _ in pieces[:3]] == ["<0x00>", "<0x01>", "<0x02>"]
    assert pieces[32:34] == [("\u2581", 1), ("<0x21>", 6)]
    assert pieces[256] == ("<|endoftext|>", 3)
    assert {kind for index, (_, kind) in enumerate(pieces[:256]) if index != 32} == {6}


def test_generation_in_transformers_stops_by_itself(of_bytes: Path, tmp_path: Path) -> None:
    """The likeliest token is made the end by its row of the head."""
    source = shutil.copytree(of_bytes, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(source)
    start = torch.tensor([[256, 72, 105]])
    with torch.no_grad():
        hidden = model.model(start).last_hidden_state[0, -1]
        model.lm_head.weight[256] = 100 * hidden / hidden.norm() ** 2 * hidden.norm()
    assert model.generation_config.eos_token_id == 256
    written = model.generate(start, max_new_tokens=20, do_sample=False)
    assert written.tolist() == [[256, 72, 105, 256]]


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["tokenizer.json alone", "with settings"])
def test_files_of_a_tokenizer_come_along(tmp_path: Path, settings: dict[str, str]) -> None:
    """From training to an export, to another export, to a run and back: as they were, and made where there are none."""
    tokenizer = write_metaspace(tmp_path / "model")
    (tokenizer.parent / "tokenizer.model").write_bytes(b"\xff\x00pieces")
    for name, text in settings.items():
        (tokenizer.parent / name).write_text(text)
    run = write_run_with(tmp_path / "run", tokenizer)
    way = ("hf", "again", "native", "back")
    for name, source, to in zip(way, (run, *(tmp_path / one for one in way)), ("hf", "hf", "moescale", "hf"),
                                strict=False):
        call("convert", source, tmp_path / name, "--to", to)
    ours = load_tokenizer(str(tokenizer))
    text = "hello world  a\n"
    for name in ("hf", "again", "back"):
        there = tmp_path / name
        for file, text_of_file in settings.items():
            assert (there / file).read_text() == text_of_file
        assert (there / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
        assert (there / "tokenizer.model").read_bytes() == b"\xff\x00pieces"
        config, generation = (json.loads((there / f"{part}config.json").read_text()) for part in ("", "generation_"))
        theirs = AutoTokenizer.from_pretrained(there)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.begin, ours.end) == (1, 2)
        assert config["bos_token_id"] == generation["bos_token_id"] == 1
        assert config["eos_token_id"] == generation["eos_token_id"] == ([2, 9] if settings else 2)
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode_batch([text])[0].tolist()
    if settings:
        assert AutoTokenizer.from_pretrained(tmp_path / "back").apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False) == "hi</s>"


def test_tokens_that_a_run_names_come_before_what_files_say(tmp_path: Path) -> None:
    """A run that was trained with data.begin_token and data.end_token stops at its end in other programs, too."""
    tokenizer = write_metaspace(tmp_path / "model", {"<|start|>": True, "<|done|>": True})
    for name, text in SETTINGS.items():
        (tokenizer.parent / name).write_text(text)
    run = write_run_with(tmp_path / "run", tokenizer, begin_token="<|start|>", end_token="<|done|>")
    call("convert", run, tmp_path / "hf", "--to", "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    begin, end = (theirs.convert_tokens_to_ids(token) for token in ("<|start|>", "<|done|>"))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (begin, end)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for found in (model.config, model.generation_config):
        assert (found.bos_token_id, found.eos_token_id) == (begin, [end, 2, 9])
    assert model.generation_config.temperature == 0.7


@pytest.mark.parametrize("content", ["", "{}", '{"model": []}', '{"model": {"type": "BPE", "vocab": 3}}', "["])
def test_a_tokenizer_json_that_is_none_goes_along_and_is_named_when_it_is_needed(
    of_bytes: Path, tmp_path: Path, content: str
) -> None:
    source = shutil.copytree(of_bytes, tmp_path / "source")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(content)
    call("convert", source, tmp_path / "hf", "--to", "hf")
    call("convert", tmp_path / "hf", tmp_path / "run", "--to", "moescale")
    assert "tokenizer.json" in call("generate", tmp_path / "run", status=2)


def test_token_ids_of_config_json_alone_make_a_generation_config(of_bytes: Path, tmp_path: Path) -> None:
    source = shutil.copytree(of_bytes, tmp_path / "source")
    (source / "generation_config.json").unlink()
    values = json.loads((source / "config.json").read_text()) | {"eos_token_id": [7, 8], "pad_token_id": 9}
    (source / "config.json").write_text(json.dumps(values))
    call("convert", source, tmp_path / "run", "--to", "moescale")
    call("convert", tmp_path / "run", tmp_path / "back", "--to", "hf")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "back" / name).read_text())
        assert (found["eos_token_id"], found["pad_token_id"]) == ([7, 8], 9)


def test_a_converted_run_trains_on_with_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the weights that were converted, with the tokenizer beside them, in the folder that was converted to."""
    monkeypatch.chdir(tmp_path)
    run = write_run_with(tmp_path / "run", write_metaspace(tmp_path / "model"))
    call("convert", run, "hf", "--to", "hf")
    said = call("convert", "hf", "runs/mine", "--to", "moescale")
    assert "moescale train runs/mine/config.yaml" in said
    state = json.loads((tmp_path / "runs/mine/checkpoints/step_00000000/checkpoint.json").read_text())["state"]
    assert state["converted"] is True
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / f"text/{number}.txt").write_text("hello world " * 20)
    said = call("train", "runs/mine/config.yaml", "data.files=[text/*.txt]", "data.cache_dir=cache", "data.seq_len=16",
                "data.global_batch=2", "run.steps=1", "monitor.moved_every=null", "optim.lr=1e-9")
    assert "going on from runs/mine/checkpoints/step_00000000" in said
    assert not (tmp_path / "runs/default").exists()
    tokens = torch.randint(259, (1, 20))
    before, after = (moescale.load(path).logits(tokens) for path in ("run", "runs/mine"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    shutil.move("runs/mine", "runs/moved")
    call("generate", "runs/moved", "--prompt", "hello", "--tokens", 2)


@pytest.mark.parametrize("to", ["hf", "megatron", "deepspeed"])
def test_a_tokenizer_that_did_not_come_along_is_named_and_asked_for(tmp_path: Path, to: str) -> None:
    write_run(tmp_path / "run", with_tokenizer(make_config({"window": None}), None))
    said = call("convert", tmp_path / "run", tmp_path / "there", "--to", to)
    assert "tokenizer" in said
    if to == "hf":
        (tmp_path / "there/tokenizer.model").write_bytes(b"pieces")
    said = call("convert", tmp_path / "there", tmp_path / "back", "--to", "moescale")
    assert "data.tokenizer is null" in said
    assert ("AutoTokenizer" in said) == (to == "hf")
    assert open_source(tmp_path / "back").config.data.tokenizer is None
    assert "data.tokenizer" in call("generate", tmp_path / "back", status=2)
    assert "data.tokenizer" in call("train", tmp_path / "back/config.yaml", f"data.files=[{tmp_path}/*.txt]", status=2)


@pytest.mark.parametrize(("model", "word"), [
    ({"window": 7}, "window"), ({"activation": "geglu"}, "hidden_act"), ({"vocab_size": 272}, None), ({}, None)])
def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path, model: dict[str, Any], word: str | None) -> None:
    """Rows beyond the tokenizer are filled up where there is a tokenizer.model, as of `bytes`."""
    write_run(tmp_path / "run", make_config({**DENSE, "window": None, **model}))
    said = call("convert", tmp_path / "run", tmp_path / "hf", "--to", "hf")
    assert ("llama.cpp" in said) == (word is not None)
    assert word is None or word in said


def test_rows_that_llama_cpp_cannot_fill_up_are_said(tmp_path: Path) -> None:
    tokenizer = write_metaspace(tmp_path / "model")
    said = call("convert", write_run_with(tmp_path / "run", tokenizer), tmp_path / "hf", "--to", "hf")
    assert "rows beyond" in said
    (tokenizer.parent / "tokenizer.model").write_bytes(b"pieces")
    said = call("convert", write_run_with(tmp_path / "other", tokenizer), tmp_path / "there", "--to", "hf")
    assert "rows beyond" not in said


@pytest.mark.parametrize("model", [{"window": 7}, {"window": None, **DENSE}], ids=["mixtral with a window", "llama"])
def test_transformers_generates_the_same_tokens(tmp_path: Path, model: dict[str, Any]) -> None:
    """Greedy tokens, far beyond a window, of random weights: every prompt of ours in one batch, theirs one by one."""
    run = write_run(tmp_path / "run", make_config(model), std=0.4)
    convert(open_source(run), tmp_path / "hf", "hf", FileLayout())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    draw = random.Random(0)
    prompts = [[256, *(draw.randrange(256) for _ in range(length))] for length in (0, 3, 24)]
    found = moescale.load(run).generate(prompts, 30, temperature=0)
    for prompt, (written,) in zip(prompts, found, strict=True):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False)
        scores = theirs(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
        assert prompt + written == wanted[0].tolist()
        assert len(set(written)) > 5, "not one token again and again"
        best = scores.topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) > 1e-4, "no tie that rounding would decide"
