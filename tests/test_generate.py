"""Text from a checkpoint: where it begins, where it ends, its spaces, and prompts and numbers that are odd."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from typer.testing import CliRunner

import moescale.generate
from moescale.checkpoint.store import read_state, write_manifest
from moescale.cli import app
from moescale.config import ConfigError
from moescale.data.tokenizer import load_tokenizer
from moescale.generate import usual_context
from moescale.scoring import Scorer
from tests.support.groups import in_groups
from tests.support.tokenizers import write_metaspace

WORDS = ("hello a", "a hello a", "hello hello")  # documents so short that their ends are learnt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt three documents by heart, with a tokenizer shaped as Llama's."""
    folder = tmp_path_factory.mktemp("generate")
    path = write_metaspace(folder / "tokenizer", {"<pad>": True})
    lines = [json.dumps({"text": f"{text} {'hello' * (number % 2)}".strip()}) for number, text in enumerate(WORDS * 40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    rows = load_tokenizer(str(path)).vocab_size
    (folder / "tiny.yaml").write_text(json.dumps({
        "run": {"dir": str(folder / "run"), "steps": 40},
        "data": {"files": [str(folder / "text.jsonl")], "tokenizer": str(path), "cache_dir": str(folder / "cache"),
                 "seq_len": 24, "global_batch": 8, "held_out": 0.2},
        **in_groups({"vocab_size": rows, "d_model": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
                  "head_dim": 16, "init": "fan_in"}),
        "moe": {"num_experts": 3, "top_k": 2, "d_ff": 32}, "optim": {"lr": 0.02},
        "monitor": {"every": 20, "moved_every": None, "eval_sequences": 3}}))
    result = CliRunner().invoke(app, ["train", str(folder / "tiny.yaml")])
    assert result.exit_code == 0, result.output
    return folder / "run"


def generate(run: Path, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", str(run), *map(str, arguments)])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("prompt", ["", "hello", "a hello", "hello a"])
def test_a_document_goes_on_with_its_spaces_and_ends_by_itself(run: Path, prompt: str) -> None:
    status, text = generate(run, "--prompt", prompt, "--tokens", 200, "--temperature", 0)
    assert status == 0
    assert text.startswith(prompt)
    assert set(text.split()) <= {"hello", "a"}
    assert len(text.split()) < 8, "far from 200 tokens"
    assert "  " not in text
    assert "<" not in text


def drawn(monkeypatch: pytest.MonkeyPatch, *ids: int) -> list[list[int]]:
    """Let these ids be drawn. Returns what the model is given to begin with."""
    starts: list[list[int]] = []

    def steps(model: object, prompts: list[list[int]], num_tokens: int, **options: object) -> Iterator[list[int]]:
        starts.extend(prompts)
        for index in ids[:num_tokens]:
            yield [index]
            if index in options["stops"]:
                return

    monkeypatch.setattr(moescale.generate, "next_tokens", steps)
    return starts


def test_text_is_what_the_tokenizer_decodes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(run.parent / "tokenizer/tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    wanted = backend.encode("hello a é🙂 hello", add_special_tokens=False).ids
    before, after = wanted[:1], wanted[1:]
    starts = drawn(monkeypatch, *after, 2, *before)
    status, text = generate(run, "--prompt", "hello")
    assert (status, text) == (0, "hello a é🙂 hello\n"), "the end token ends it"
    assert starts == [backend.encode("hello").ids], "as the tokenizer itself begins"
    assert generate(run, "--prompt", "hello", "--tokens", len(after) - 1)[1] == "hello a é🙂\n"


def test_special_tokens_in_a_prompt(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = drawn(monkeypatch)
    status, text = generate(run, "--prompt", "<s>hello</s>")
    assert status == 0
    assert "--special" in text
    assert starts[0][0] == 1
    assert not {1, 2} & set(starts[0][1:])
    status, text = generate(run, "--prompt", "<s>hello</s>", "--special")
    assert (status, text) == (0, "<s>hello</s>\n")
    assert starts[1][0] == 1
    assert starts[1].count(1) == 1, "one beginning"
    assert starts[1][-1] == 2
    status, text = generate(run, "--prompt", "hello<pad>", "--special")
    assert status == 2
    assert "<pad>" in text


@pytest.mark.parametrize("temperature", ["0", "-0.0", "1e-6", "1e-38", "1e-40", "1e-320", "1e300"])
@pytest.mark.parametrize("more", [(), ("--top-k", 1), ("--top-k", 10**9)], ids=str)
def test_any_temperature_draws(run: Path, temperature: str, more: tuple) -> None:
    assert generate(run, "--prompt", "a", "--tokens", 2, "--temperature", temperature, *more)[0] == 0


@pytest.mark.parametrize(("arguments", "key"), [
    (["--temperature", "nan"], "temperature"), (["--temperature", "inf"], "temperature"),
    (["--temperature", "-1"], "temperature"), (["--prompt", "\udcff a"], "--prompt"), (["--seed", 2**70], "seed"),
    (["--tokens", 0], "tokens"), (["--top-k", 0], "top-k"), (["--top-p", "0"], "top_p"), (["--top-p", "nan"], "top_p"),
    (["--samples", 0], "samples"), (["--context", 0], "context")])
def test_what_cannot_be_drawn_is_one_line(run: Path, arguments: list, key: str) -> None:
    status, text = generate(run, *arguments)
    assert status == 2
    assert key in text


def test_weights_that_are_no_numbers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescale.model.language_model.LanguageModel.next_scores",
                        lambda model, tokens, *others: torch.full((len(tokens), 300), math.nan))
    status, text = generate(run)
    assert status == 2
    assert "not finite" in text


def test_several_prompts_and_samples_are_each_as_alone(run: Path) -> None:
    options = ("--temperature", 1.5, "--top-p", 0.95, "--seed", 5, "--tokens", 6)
    status, text = generate(run, "--prompt", "a", "--prompt", "hello", "--samples", 2, *options)
    assert status == 0
    alone = {prompt: generate(run, "--prompt", prompt, *options)[1].removesuffix("\n") for prompt in ("a", "hello")}
    parts = text.removesuffix("\n").split("--- prompt ")
    assert [part.split("\n")[0] for part in parts[1:]] == [
        "1, sample 1", "1, sample 2", "2, sample 1", "2, sample 2"]
    texts = [part.partition("\n")[2].removesuffix("\n") for part in parts[1:]]
    assert [texts[0], texts[2]] == [alone["a"], alone["hello"]]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, ("a", "a", "hello", "hello"), strict=True))
    assert texts[0] != texts[1]


def test_how_far_a_model_looks_back(run: Path) -> None:
    config = moescale.generate.load_trained(run).config
    assert usual_context(config) == 24, "rotary positions, no window: as far as in training"
    for change, bound in (({"window": 24}, None), ({"window": 25}, 24), ({"positions": "alibi"}, None),
                          ({"positions": "none"}, 24), ({"positions": "none", "window": 3}, None)):
        other = config.model_copy(update={"attention": config.attention.model_copy(update=change)})
        assert usual_context(other) == bound
    long = ("--prompt", "a hello " * 20, "--temperature", 0, "--tokens", 5)
    assert generate(run, *long)[0] == 0
    assert generate(run, *long, "--context", 3)[0] == 0


def test_likelihoods_equal_sums_over_logits(run: Path) -> None:
    scorer = Scorer(run)
    encode = tokenizers.Tokenizer.from_file(str(run.parent / "tokenizer/tokenizer.json")).encode

    def score(before: list[int], wanted: list[int]) -> tuple[float, bool]:
        logits = scorer.model.logits(torch.tensor([before + wanted]))[0].double()
        rows = logits.log_softmax(-1)[len(before) - 1 : -1]
        return (float(sum(row[index] for row, index in zip(rows, wanted, strict=True))),
                all(int(row.argmax()) == index for row, index in zip(rows, wanted, strict=True)))

    for context, continuation in (("hello", " a"), ("hello ", "a"), ("a hello", " hello é"), ("a", " hello a hello")):
        before, whole = encode(context.rstrip()).ids, encode(context + continuation).ids
        expected = score(before, whole[len(before) :])
        assert scorer.loglikelihood(context, continuation) == pytest.approx(expected, abs=1e-5)
    own = encode("hello", add_special_tokens=False).ids
    assert scorer.loglikelihood("", "hello") == pytest.approx(score([1], own), abs=1e-5)
    assert scorer.loglikelihood("   ", "a")[0] < 0
    text = "hello a " * 40
    ids, size = encode(text).ids, 24
    assert len(ids) > 3 * size
    assert len(ids) % size
    windows = [([1], ids[:size])]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        windows.append((ids[end - size - 1 : start], ids[start:end]))
    assert scorer.loglikelihood_rolling(text) == pytest.approx(sum(score(*window)[0] for window in windows))
    assert scorer.loglikelihood_rolling("hello") == pytest.approx(score([1], [1, *own])[0])
    with pytest.raises(ConfigError, match=r"data.seq_len"):
        scorer.loglikelihood("a", text)


def evaluate(run: Path, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["evaluate", str(run), *map(str, arguments)])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.output


def test_evaluate_measures_what_training_measured(run: Path) -> None:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    status, text = evaluate(run, "--json")
    assert status == 0, text
    found = json.loads(text)
    assert found["split"] == "held-out"
    assert found["step"] == 40
    assert found["loss"] == pytest.approx(line["eval_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(line["eval_bits_per_byte"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(line["eval_loss"]), rel=1e-4)
    assert found["scored_tokens"] == 3 * 24, "as many sequences as training looks at"
    every = json.loads(evaluate(run, "--all", "--json")[1])
    assert every["scored_tokens"] == every["tokens"] - 1 == found["tokens"] - 1 > 3 * 24
    assert f"{found['loss']:.4f}" in evaluate(run)[1]


def test_evaluate_takes_all_of_other_files(run: Path) -> None:
    other = run.parent / "other.txt"
    other.write_text("a hello")
    status, text = evaluate(run, f"data.files=[{other}]", "--json")
    assert status == 0, text
    found = json.loads(text)
    assert (found["split"], found["documents"], found["bytes"]) == ("files", 1, 7)
    assert found["tokens"] == 4, "beginning, two words, end"
    encoded = torch.tensor([[1, *load_tokenizer(str(run.parent / "tokenizer/tokenizer.json")).encode_batch(
        ["a hello"])[0].tolist(), 2]])
    rows = Scorer(run).model.logits(encoded)[0].log_softmax(-1)
    expected = -sum(float(rows[place, index]) for place, index in enumerate(encoded[0, 1:].tolist())) / 3
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    status, text = evaluate(run, "model.d_model=64")
    assert status == 2
    assert "model.d_model" in text


def test_generate_of_transformers_stops_by_itself(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "export"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for prompt in ("hello", "a hello"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(ids, max_new_tokens=200, do_sample=False)[0].tolist()
        assert found[-1] == 2
        assert len(found) < 20
        ours = generate(run, "--prompt", prompt, "--temperature", 0)[1]
        assert tokenizer.decode(found, skip_special_tokens=True) == ours.removesuffix("\n")


def test_a_run_of_the_time_before_goes_on_with_its_boundary(run: Path, tmp_path: Path) -> None:
    def train(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["train", str(run.parent / "tiny.yaml"), f"run.dir={tmp_path}", *more])
        assert not isinstance(result.exception, Exception), result.exception
        return result.exit_code, result.output

    both = ("data.begin_token=</s>", "data.end_token=</s>")  # as the one token by name that stood before each document
    assert train("run.steps=2", *both)[0] == 0
    checkpoint = tmp_path / "checkpoints/step_00000002"
    for file in (checkpoint / "config.yaml", tmp_path / "config.yaml"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if "begin_token" not in line and "end_token" not in line))
    state = read_state(checkpoint)
    write_manifest(checkpoint, {key: state[key] for key in ("step", "seed")})
    status, text = train("run.steps=4")
    assert status == 2
    assert all(key in text for key in both), "what to write to go on with the same tokens"
    status, text = train("run.steps=4", *both)
    assert status == 0, text
