"""Entries of `model.pattern` with keys of their own: resolved by layer, refused where they cannot be, never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moescale
from moescale.config import ConfigError, load_config, parse_config, read_overrides
from moescale.config.changes import is_harmless
from moescale.convert.edits.experts import upcycle
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from moescale.planner.count import model_flops_per_token
from moescale.verify import display
from moescale.verify.candidates import Layout
from moescale.verify.shrink import shrink
from tests.support.models import make_config, write_run

PATTERN = [
    {"channel_mixer": "feed_forward", "attention": {"window": 600, "num_kv_heads": 1}},
    {"channel_mixer": "moe", "attention": {"head_dim": 64}, "moe": {"d_ff": 256}},
]


def parse(pattern: Any, **attention: Any) -> Any:
    return parse_config({"model": {"pattern": pattern}, "attention": attention, "data": {"seq_len": 1200}}, "test")


def test_keys_of_an_entry_lie_over_those_of_the_kind(tmp_path: Path) -> None:
    config = parse(PATTERN)
    assert [layer.mixer.window for layer in config.layers] == [600, None, 600, None]
    assert [layer.mixer.num_kv_heads for layer in config.layers] == [1, 2, 1, 2]
    assert [layer.channel_mixer.d_ff for layer in config.layers] == [1024, 256, 1024, 256]
    assert config.longest_window is None
    assert parse(PATTERN[:1], window=7).longest_window == 600
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    written = "model.pattern=[{attention: {window: 1e1}}, {channel_mixer: moe}]"
    assert read_overrides([written])["model"]["pattern"][0]["attention"] == {"window": 10}


def test_a_shrunk_run_keeps_what_differs_between_layers() -> None:
    small = shrink(parse(PATTERN), [Layout(tp=2, dp_shard=1)])
    assert [set(entry.attention) for entry in small.model.pattern] == [{"window", "num_kv_heads"}, {"head_dim"}]
    (window, none), seq_len = (layer.mixer.window for layer in small.layers[:2]), small.data.seq_len
    assert none is None
    assert window == seq_len // 2
    assert small.layers[1].channel_mixer.d_ff == 16


@pytest.mark.parametrize(("pattern", "words"), [
    ([{"attention": {"windw": 3}}], r"model\.pattern\.0\.attention.*windw"),
    ([{}, {"attention": {"num_kv_heads": 3}}], r"model\.pattern\.1\.attention.*num_kv_heads=3"),
    ([{"feed_forward": {"d_ff": 64}}], "leave out feed_forward"),
    ([{"moe": {"num_experts": 3}}], r"moe\.num_experts is the same in all layers"),
])
def test_what_no_layer_can_have_is_refused(pattern: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(pattern)


@pytest.mark.parametrize("text", ["model.pattern=[{attention: 3}]", "model.pattern=[{attention: {windw: 3}}]"])
def test_an_override_that_no_entry_can_have_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"window|num_heads"):
        read_overrides([text])


@pytest.mark.parametrize("to", ["hf", "megatron", "deepspeed"])
def test_formats_that_have_one_kind_of_layer_refuse_two(tmp_path: Path, to: str) -> None:
    run = write_run(tmp_path / "run", make_config({"pattern": [{}, {"attention": {"window": 5}}]}))
    with pytest.raises(ConfigError, match=r"model\.pattern\.1\.attention\.window=5"):
        convert(open_source(run), tmp_path / "out", to, FileLayout())
    convert(open_source(run), tmp_path / "same", "moescale", FileLayout())
    assert open_source(tmp_path / "same").config.layers[1].mixer.window == 5


def test_all_that_counts_and_compares_layers_asks_each() -> None:
    alone = parse([{"channel_mixer": "feed_forward"}])
    more = parse([{"channel_mixer": "feed_forward"}, {"channel_mixer": "feed_forward", "attention": {"num_heads": 16}}])
    wider = 2 * 2 * 256 * 8 * 32  # q and o of two layers
    assert model_flops_per_token(more) - model_flops_per_token(alone) == 6 * wider + 12 * 2 * 8 * 32 * 1200
    turned = parse([{}, {"attention": {"positions": "rope"}}], positions="none")
    assert not is_harmless("attention.rope_theta", turned, turned)
    assert is_harmless("attention.rope_theta", parse([{}], positions="none"), parse([{}], positions="none"))
    assert "window 600 in 2 layers" in display.describe(parse(PATTERN))
    short = parse_config({"model": {"num_layers": 1, "pattern": list(PATTERN)}}, "test")  # longer than the model
    assert shrink(short, [Layout()]).layers[1].channel_mixer.d_ff == 16


def test_upcycling_keeps_what_differs_between_layers(tmp_path: Path) -> None:
    pattern = [{"channel_mixer": "none"}, {"channel_mixer": "feed_forward", "attention": {"window": 5}},
               {"channel_mixer": "feed_forward", "feed_forward": {"d_ff": 48, "activation": "gelu"}}]
    run = write_run(tmp_path / "run", make_config({"pattern": pattern}))
    opened = open_source(run)
    convert(opened, tmp_path / "there", "moescale", FileLayout(), change=upcycle(opened, 4, None, 2, 0.0))
    tokens = torch.arange(20).view(1, 20)
    new, old = (moescale.load(folder).logits(tokens) for folder in (tmp_path / "there", run))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
