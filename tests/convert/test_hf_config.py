"""What a config.json means: defaults as in transformers, what is refused by name, a coefficient that weighs alike."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, JambaConfig, LlamaConfig, Mamba2Config, MambaConfig, MistralConfig, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moescale.config import ConfigError
from moescale.convert.formats.hf.base import COMMON
from moescale.convert.formats.hf.config import HARMLESS, NEUTRAL, read_config, write_config
from moescale.convert.formats.hf.families import FAMILIES
from moescale.moe.losses import load_balance_loss
from tests.support.models import DENSE, make_config

DEFAULTS = {name: {key.name: key.default for key in family.keys.values()} for name, family in FAMILIES.items()}
CLASSES = {"mixtral": MixtralConfig, "mistral": MistralConfig, "llama": LlamaConfig, "mamba": MambaConfig,
           "mamba2": Mamba2Config, "jamba": JambaConfig}
SMALL = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def read(kind: str, **changes: Any) -> Any:
    return read_config({"model_type": kind, **SMALL, **changes}, "config.json", None)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_key_that_is_absent_has_the_default_of_its_class(kind: str) -> None:
    theirs = CLASSES[kind]().to_dict()
    rope = theirs.pop("rope_parameters", {})
    theirs |= {name: rope[name] for name in ("rope_theta",) if name in rope}
    for name in ("head_dim", "num_key_value_heads", "time_step_rank", "mamba_dt_rank"):
        if DEFAULTS[kind].get(name) in (None, "auto"):
            theirs[name] = DEFAULTS[kind].get(name)  # the class works it out from other keys
    told = {key: value for key, value in DEFAULTS[kind].items() if not key.startswith(("rope_sc", "rope_p", "layer_t"))}
    assert told == {key: theirs.get(key) for key in told}
    undecided = {key for key in theirs.keys() - told.keys() - HARMLESS - NEUTRAL.keys() if theirs[key] is not None}
    assert not undecided, "keys of the class that nobody decided about"
    neutral = {key: value for key, value in theirs.items() if key in NEUTRAL and key not in told}
    assert neutral == {key: NEUTRAL[key] for key in neutral}


def test_an_empty_configuration_of_a_recurrent_model_is_the_class() -> None:
    mamba, mamba2, jamba = (read_config({"model_type": kind}, "config.json", None)
                            for kind in ("mamba", "mamba2", "jamba"))
    for config, theirs in ((mamba, MambaConfig()), (mamba2, Mamba2Config()), (jamba, JambaConfig())):
        assert (config.model.d_model, config.model.num_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
    theirs = MambaConfig()
    assert (mamba.mamba.d_inner(768), mamba.mamba.rank(768)) == (theirs.intermediate_size, theirs.time_step_rank)
    assert mamba2.mamba2.num_heads(mamba2.model.d_model) == Mamba2Config().num_heads
    layers, theirs = jamba.model.layers, JambaConfig()
    assert [layer.mixer for layer in layers] == theirs.layers_block_type
    assert [16 if layer.channel_mixer == "moe" else 1 for layer in layers] == theirs.layers_num_experts
    assert len(jamba.model.pattern) == 8


@pytest.mark.parametrize("kind", ["mixtral", "mistral", "llama"])
def test_an_empty_configuration_is_the_class(kind: str) -> None:
    config, theirs = read_config({"model_type": kind}, "config.json", None), CLASSES[kind]()
    model = config.model
    assert (model.d_model, config.attention.num_heads, model.num_layers) == (
        theirs.hidden_size, theirs.num_attention_heads, theirs.num_hidden_layers)
    assert (config.attention.num_kv_heads, config.attention.head_dim) == (
        theirs.num_key_value_heads, theirs.hidden_size // theirs.num_attention_heads)
    assert (config.attention.rope_theta, model.norm_eps) == (theirs.rope_parameters["rope_theta"], theirs.rms_norm_eps)
    assert config.attention.window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(("kind", "changes", "key"), [
    ("llama", {"attention_bias": True}, "attention_bias"), ("llama", {"mlp_bias": True}, "mlp_bias"),
    *(("llama", {"rope_scaling": {name: kind, "factor": 2.0}}, "rope_scaling")
      for name in ("type", "rope_type") for kind in ("linear", "dynamic", "yarn", "longrope", "llama3")),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters"),
    ("mistral", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}, "rope_theta"),
    ("llama", {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5e3}}, "rope_scaling"),
    ("llama", {"rope_theta": None}, "rope_theta"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("llama", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("mistral", {"use_sliding_window": False}, "use_sliding_window"),
    ("mistral", {"sliding_window": 0}, "sliding_window"), ("mistral", {"max_window_layers": 1}, "max_window_layers"),
    ("mixtral", {"hidden_act": "gelu_new"}, "hidden_act"), ("mixtral", {"hidden_act": None}, "hidden_act"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm"),
    ("llama", {"is_causal": False}, "is_causal"), ("llama", {"query_scale": 2.0}, "query_scale"),
    ("mixtral", {"num_experts": 5, "num_local_experts": 4}, "num_experts"),
    ("llama", {"vocab_size": "264"}, "vocab_size"), ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
], ids=str)
def test_what_changes_the_model_is_refused_by_name(kind: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: .*{key}[ =.]") as caught:
        read(kind, **{**(MIXTURE if kind == "mixtral" else {}), **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "changes"), [
    ("llama", {"pretraining_tp": 2, "use_cache": False, "bos_token_id": [1], "attention_dropout": 0.1, "odd": None}),
    ("llama", {"rope_scaling": None, "layer_types": ["full_attention"] * 2, "sliding_window": None, "mlp_bias": None}),
    ("llama", {"rope_scaling": {"type": "default"}, "max_window_layers": 2, "use_sliding_window": False}),
    ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "max_sequence_length": 99, "is_causal": True}),
    ("mixtral", {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
])
def test_what_says_nothing_of_the_model_is_taken(kind: str, changes: dict[str, Any]) -> None:
    assert read(kind, **changes).model.d_model == 32


def test_theta_lies_where_each_version_of_transformers_puts_it() -> None:
    for place in ({"rope_theta": 5e3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
                  {"rope_scaling": {"rope_type": "default", "rope_theta": 5e3}}):
        assert read("llama", **place).attention.rope_theta == 5e3


@pytest.mark.parametrize(("layers", "top_k"), list(itertools.product((2, 4), (1, 2))))
def test_the_balance_loss_weighs_as_much_as_in_transformers(layers: int, top_k: int) -> None:
    """All layers routed alike, so that their product of means over layers and our mean of products are one number."""
    torch.manual_seed(0)
    logits = torch.randn(96, 4) * 2
    theirs = 0.02 * float(load_balancing_loss_func((logits,) * layers, 4, top_k))
    config = read("mixtral", num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=top_k,
                  router_aux_loss_coef=0.02)
    probs = logits.softmax(-1)
    choices = torch.bincount(probs.topk(top_k).indices.flatten(), minlength=4)[None]
    ours = layers * float(load_balance_loss(probs.sum(0, keepdim=True), choices)) / 96
    assert config.moe.load_balance_coefficient * ours == pytest.approx(theirs, rel=1e-6)
    assert config.moe.balance_over == "global_batch"
    assert write_config(config, torch.float32, {})["router_aux_loss_coef"] == 0.02


def test_what_came_with_the_model_stays_with_it(tmp_path: Any) -> None:
    """Beside the model; of another model, only what is no size of it."""
    carried = {"model_type": "llama", **SMALL, "max_position_embeddings": 32768, "eos_token_id": [2, 7],
               "pad_token_id": 9, "transformers_version": "4.40.0", "torch_dtype": "float16"}
    config = read_config(carried, "config.json", None)
    back = write_config(config, torch.bfloat16, carried)
    assert config.data.seq_len == 4096
    assert (back["max_position_embeddings"], back["eos_token_id"], back["pad_token_id"]) == (32768, [2, 7], 9)
    assert back["torch_dtype"] == "bfloat16"
    other = write_config(make_config(DENSE), torch.float32, carried)
    assert other["max_position_embeddings"] == make_config().data.seq_len
    assert "pad_token_id" not in other
    (tmp_path / "config.json").write_text(json.dumps(back))
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 32768


def test_a_mistral_without_a_window_gets_none_on_its_way(tmp_path: Any) -> None:
    """It is written as a Llama, whose model_type stays, or the window that a Mistral has by default would come back."""
    carried = {"model_type": "mistral", **SMALL, "sliding_window": None, "attention_dropout": 0.1}
    config = read_config(carried, "config.json", None)
    back = write_config(config, torch.float32, carried)
    assert read_config(back, "config.json", None).model == config.model
    (tmp_path / "config.json").write_text(json.dumps(back))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == [f"{theirs.model_type.capitalize()}ForCausalLM"]
    assert (getattr(theirs, "sliding_window", None), theirs.attention_dropout) == (None, 0.1)


def test_every_key_is_of_one_kind() -> None:
    assert not HARMLESS & (NEUTRAL.keys() | COMMON.keys())
