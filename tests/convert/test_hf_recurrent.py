"""Mamba, Mamba-2 and Jamba of `transformers`, on files that it wrote: logits and greedy tokens both ways, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, JambaConfig, Mamba2Config, MambaConfig, PreTrainedConfig
from typer.testing import CliRunner

import moescale
from moescale.cli import app
from moescale.config import ConfigError
from moescale.convert.formats.hf.config import read_config
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from tests.support.models import make_config, write_run

SMALL = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3}
HYBRID = {**SMALL, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
          "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8}
PEERS: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(**SMALL, state_size=8, time_step_rank=3),
    "mamba, untied": MambaConfig(**SMALL, expand=3, conv_kernel=3, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "mamba2": Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=4),
    "mamba2, one group": Mamba2Config(**SMALL, state_size=6, expand=3, num_heads=6, head_dim=16, n_groups=1,
                                      conv_kernel=3, tie_word_embeddings=True, layer_norm_epsilon=1e-3),
    "jamba": JambaConfig(**HYBRID, num_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-3),
    "jamba, one expert a token": JambaConfig(**HYBRID, num_experts=4, num_experts_per_tok=1, expert_layer_period=1,
                                             expert_layer_offset=0, tie_word_embeddings=True, mamba_dt_rank=5),
    "jamba, dense": JambaConfig(**HYBRID, num_experts=1, num_experts_per_tok=1),
}


@pytest.fixture(scope="module", params=PEERS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with weights that show, saved by its own writer. -> it, and its folder"""
    folder = tmp_path_factory.mktemp("peer")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PEERS[request.param]).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias", "dt_proj.bias")):  # decays and steps stay what they usually are
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None  # nothing ends a text
    return model, folder


@torch.no_grad()
def test_both_ways(tmp_path: Path, peer: tuple[Any, Path]) -> None:
    """Logits within 1e-4, the same greedy tokens, and every weight back bit for bit."""
    theirs, folder = peer
    tokens = torch.randint(264, (2, 40), generator=torch.Generator().manual_seed(1))
    convert(open_source(folder), tmp_path / "run", "moescale", FileLayout())
    ours = moescale.load(tmp_path / "run")
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    for prompt in (tokens[0, :2], tokens[1, :9]):  # one shorter than a convolution
        written = theirs.generate(prompt[None], max_new_tokens=24, do_sample=False)
        assert ours.generate([prompt.tolist()], 24, temperature=0)[0][0] == written[0, len(prompt) :].tolist()
    convert(open_source(tmp_path / "run"), tmp_path / "back", "hf", FileLayout())
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_the_command_holds_both_models_to_each_other(tmp_path: Path, peer: tuple[Any, Path]) -> None:
    _, folder = peer
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "run"), "--to", "moescale", "--verify"])
    assert result.exit_code == 0, result.output
    assert "largest difference of the logits" in result.output


def test_stacked_experts_of_transformers_5(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PEERS["jamba"]).eval()
    model.save_pretrained(tmp_path / "peer", save_original_format=False)
    convert(open_source(tmp_path / "peer"), tmp_path / "run", "moescale", FileLayout())
    convert(open_source(tmp_path / "run"), tmp_path / "back", "hf", FileLayout(style="fused"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("peer", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("name", "changes", "key"), [
    ("mamba", {"use_bias": True}, "use_bias"), ("mamba", {"use_conv_bias": False}, "use_conv_bias"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act"), ("mamba", {"rms_norm": False}, "rms_norm"),
    ("mamba", {"ssm_cfg": {"d_state": 8}}, "ssm_cfg"), ("mamba", {"odd": 1}, "odd"),
    ("mamba2", {"use_bias": True}, "use_bias"), ("mamba2", {"use_conv_bias": False}, "use_conv_bias"),
    ("mamba2", {"hidden_act": "gelu"}, "hidden_act"), ("mamba2", {"rms_norm": False}, "rms_norm"),
    ("mamba2", {"time_step_limit": [0.0, 0.5]}, "time_step_limit"), ("mamba2", {"num_heads": 3}, "num_heads"),
    ("mamba2", {"time_step_limit": [0.001, {"__float__": "Infinity"}]}, "time_step_limit"),
    ("jamba", {"hidden_act": "gelu"}, "hidden_act"), ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias"),
    ("jamba", {"mamba_conv_bias": False}, "mamba_conv_bias"), ("jamba", {"sliding_window": 8}, "sliding_window"),
], ids=str)
def test_what_cannot_be_expressed_is_refused_by_name(name: str, changes: dict[str, Any], key: str) -> None:
    values = {**json.loads(PEERS[name].to_json_string()), **changes}
    with pytest.raises(ConfigError, match=rf"^config.json: .*{key}[ =]") as caught:
        read_config(values, "config.json", None)
    assert "\n" not in str(caught.value)


MAMBA = [{"mixer": "mamba", "channel_mixer": "none"}]


@pytest.mark.parametrize(("model", "moe", "words"), [
    ({"pattern": [*MAMBA, {"mixer": "mamba", "channel_mixer": "feed_forward"}]}, {},
     "a layer with mixer=mamba and channel_mixer="),
    ({"pattern": MAMBA, "norm": "layernorm"}, {}, "model.norm=layernorm"),
    ({"pattern": [{"mixer": "mamba"}, {}]}, {"normalize_weights": False}, "attention.positions=rope"),
], ids=str)
def test_what_no_family_can_have(tmp_path: Path, model: dict[str, Any], moe: dict[str, Any], words: str) -> None:
    run = write_run(tmp_path / "run", make_config({**model, "window": None}, moe))
    with pytest.raises(ConfigError, match=words):
        convert(open_source(run), tmp_path / "there", "hf", FileLayout())


@pytest.mark.parametrize("to", ["megatron", "deepspeed"])
def test_other_formats_know_no_recurrent_mixer(tmp_path: Path, to: str) -> None:
    run = write_run(tmp_path / "run", make_config({"pattern": MAMBA}))
    with pytest.raises(ConfigError, match=r"model\.pattern\.0 with mixer=mamba .*--to moescale"):
        convert(open_source(run), tmp_path / "there", to, FileLayout())
