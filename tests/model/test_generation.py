"""Generation: prefill and steps give what the full forward gives, and draws belong to a text, not to its batch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.config import ConfigError, parse_config
from moescale.mixers.attention import Attention
from moescale.mixers.key_value_cache import KeyValueCache
from moescale.model import generation
from moescale.model.build import build_model
from moescale.model.generation import Row, Sampling, draw, for_decoding
from moescale.model.initialize import initialize
from moescale.model.language_model import LanguageModel
from moescale.ops.attention_pattern import Visibility
from moescale.spec.attention import AttentionConfig
from moescale.spec.mamba import MambaConfig
from moescale.spec.model import describe
from tests.support.groups import in_groups

VOCAB = 260
ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {}, "switch": {"top_k": 1, "capacity_factor": 1.0, "eval_capacity_factor": 0.5},
    "gshard": {"capacity_factor": 1.0, "eval_capacity_factor": 0.5},
    "sigmoid_bias": {"num_expert_groups": 2, "top_k_groups": 1, "num_shared_experts": 1},
    "expert_choice": {"capacity_factor": 2.0}, "sinkhorn": {"capacity_factor": 1.0, "eval_capacity_factor": 0.5},
}


def build(compute: str = "float32", router: str = "mixtral", **model: Any) -> LanguageModel:
    config = parse_config({
        **in_groups({"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "init": "fan_in", "num_heads": 4,
                     "num_kv_heads": 2, "head_dim": 8, "d_ff": 24, **model}),
        "moe": {"num_experts": 4, "top_k": 2, "d_ff": 24, "router": router, **ROUTERS[router]},
        "precision": {"compute": compute}, "data": {"seq_len": 32}}, "test").for_world(1)
    built = build_model(config, "cpu")
    initialize(built, describe(config), 0)
    for buffer in built.buffers():
        buffer.zero_()
    return built


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def stepped(model: LanguageModel, tokens: Tensor, positions: Tensor, cuts: list[int], length: int) -> Tensor:
    """Read up to the first cut at once, then from cut to cut. Returns the scores after each, [batch, cuts, vocab]."""
    model, scores = for_decoding(model), []
    states = model.new_states(len(tokens), length)
    for first, last in pairwise([0, *cuts]):
        part = tokens[:, first:last], positions[:, first:last]
        scores.append(model.next_scores(*part, part[1], states))
    return torch.stack(scores, 1)


def full(model: LanguageModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """Score every position without a state, document by document, each alone."""
    scores = torch.empty(*tokens.shape, VOCAB)
    for row in range(len(tokens)):
        begins = [0, *(index for index in range(1, tokens.shape[1]) if positions[row, index] == 0), tokens.shape[1]]
        for first, last in pairwise(begins):
            scores[row, first:last] = model.logits(tokens[row : row + 1, first:last])[0]
    return scores


PATTERNS: dict[str, dict[str, Any]] = {
    "rope": {}, "window": {"window": 5}, "alibi": {"positions": "alibi"}, "none": {"positions": "none"},
    "alibi window": {"positions": "alibi", "window": 5}, "palm": {"block": "parallel", "num_kv_heads": 1},
    "block": {"block_size": 5}, "alibi block": {"positions": "alibi", "block_size": 6, "window": 4},
    "segments": {"block_size": 4, "memory": 7}, "alibi segments": {"positions": "alibi", "block_size": 9, "memory": 2},
    "dilated": {"window": 3, "dilation": 3}, "every third": {"dilation": 3, "positions": "alibi"},
    "strided": {"window": 4, "stride": 4}, "strided, one key head": {"window": 4, "stride": 3, "num_kv_heads": 1},
    "global": {"window": 4, "global_tokens": 2},
    "global block": {"block_size": 6, "global_tokens": 3, "positions": "alibi"},
    "linear": {"pattern": [{"mixer": "linear_attention"}]},
    "linear and windows": {"pattern": [
        {"mixer": "linear_attention", "linear_attention": {"num_heads": 2, "head_dim": 4}},
        {"attention": {"window": 3}}]},
    "multi-head": {"num_kv_heads": 4, "norm": "layernorm"}, "tied": {"tied_embeddings": True, "scale_logits": True},
    "mamba": {"pattern": [{"mixer": "mamba", "channel_mixer": "feed_forward"}, {"mixer": "mamba"}]},
    "s4 and lssl": {"pattern": [{"mixer": "s4"}, {"mixer": "s4", "s4": {"form": "diagonal"}}, {"mixer": "lssl"}],
                    "num_layers": 3},
    "mamba2": {"pattern": [{"mixer": "mamba2", "mamba2": {"head_dim": 8, "d_state": 6, "num_groups": 2}}, {}]},
    "mamba and attention": {"pattern": [{"mixer": "mamba", "mamba": {"inner_norms": True}}, {}], "window": 5},
    "hybrid": {"pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}], "window": 3},
    "mixer alone": {"pattern": [{"channel_mixer": "none"}, {"channel_mixer": "moe"}]},
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "several documents"])
def test_states_equal_the_full_forward(name: str, documents: bool) -> None:
    model = build(**PATTERNS[name])
    tokens = torch.tensor([ids(23, 1), ids(23, 2)])
    positions = torch.arange(23).expand(2, -1)
    if documents:  # that end within what is read first, within a later part, and between two steps
        positions = torch.stack([torch.cat([torch.arange(size) for size in sizes])
                                 for sizes in ((4, 8, 3, 8), (15, 1, 7))])
    cuts = [9, *range(10, 14), 17, 18, *range(19, 24)]  # one at a time, and several after a state
    found = stepped(model, tokens, positions, cuts, 23)
    torch.testing.assert_close(found, full(model, tokens, positions)[:, [cut - 1 for cut in cuts]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_generates_as_the_full_forward_scores(router: str) -> None:
    """A batch of unequal prompts; each token's experts follow from the tokens before it alone."""
    model = build(router=router, window=6)
    prompts = [ids(1, 3), ids(11, 4), ids(5, 5)]
    found = model.generate(prompts, 12, temperature=0)
    for prompt, (written,) in zip(prompts, found, strict=True):
        scores = model.logits(torch.tensor([prompt + written]))[0]
        assert written == scores[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_and_neighbours_change_nothing(router: str) -> None:
    model = for_decoding(build(router=router, window=6))
    rows = [Row(ids(length, length), 0) for length in (2, 13, 7)]
    with torch.no_grad():
        together = generation._read(model, rows, 20, None)[0]
        alone = torch.cat([generation._read(model, [row], 20, None)[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_batch_of_samples_equals_each_prompt_alone() -> None:
    model, options = build(), {"temperature": 1.5, "top_p": 0.9, "top_k": 30, "seed": 7, "stops": {3, 4, 5, 6, 7}}
    prompts = [ids(3, 1), ids(9, 2), ids(1, 3)]
    together = model.generate(prompts, 20, samples=3, **options)
    assert together == [model.generate([prompt], 20, samples=3, **options)[0] for prompt in prompts]
    assert [each[:1] for each in together] == model.generate(prompts, 20, **options)
    texts = [sample for each in together for sample in each]
    assert len({tuple(text) for text in texts}) == 9, "samples differ"
    assert any(len(text) < 20 for text in texts), "some end by themselves"
    assert not set().union(*texts) & options["stops"]
    first, second = together[1][0][:4], together[1][0][4:]
    assert model.generate([prompts[1] + first], 16, **options)[0][0] == second, "and go on as if never cut"


def test_bfloat16_casts_weights_once_and_routers_never() -> None:
    model = build("bfloat16")
    decoding = for_decoding(model)
    assert decoding.blocks["0"].channel_mixer.experts.up.dtype == torch.bfloat16
    assert decoding.blocks["0"].channel_mixer.router.weight.dtype == torch.float32
    assert model.blocks["0"].channel_mixer.experts.up.dtype == torch.float32
    assert not model.blocks["0"].channel_mixer.router.dropless
    tokens = torch.tensor([ids(12)])
    positions = torch.arange(12).unsqueeze(0)
    found = stepped(model, tokens, positions, list(range(6, 13)), 12)
    torch.testing.assert_close(found, model.logits(tokens)[:, 5:], rtol=0, atol=0.05)
    single = for_decoding(build())
    assert single.blocks["0"].mixer.q.weight.dtype == torch.float32


def test_a_recurrent_state_is_as_large_as_described() -> None:
    model = for_decoding(build("bfloat16", pattern=[{"mixer": "mamba"}]))
    states, spec = model.new_states(3, 100_000), MambaConfig()
    assert [state.num_bytes() for state in states] == 2 * [spec.state_bytes(16, 3, 100_000, 2)]
    assert model.blocks["0"].mixer.scan.a_log.dtype == torch.float32
    model.next_scores(torch.zeros(3, 5, dtype=torch.int64), *torch.arange(5).expand(2, 3, 5), states)
    assert [state.num_bytes() for state in states] == 2 * [spec.state_bytes(16, 3, 100_000, 2)]


def test_a_window_keeps_its_size_and_no_more() -> None:
    window, whole = Attention(16, 4, 2, 8, visibilities=[Visibility(6)]), Attention(16, 4, 2, 8)
    dilated, sinks, segments = (Attention(16, 4, 2, 8, visibilities=[seen]) for seen in (
        Visibility(3, 2), Visibility(6, global_tokens=2), Visibility(block_size=3, memory=4)))
    for mixer in (window, whole, dilated, sinks, segments):
        spec = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, **vars(mixer.visibilities[0]))
        for length in (4, 6, 100):
            assert mixer.new_state(3, length).num_bytes() == spec.state_bytes(16, 3, length, 4)
    assert window.new_state(3, 100_000).num_bytes() == 2 * 3 * 6 * 2 * 8 * 4
    state = whole.new_state(3, 10)
    with pytest.raises(AssertionError, match="fewer tokens"):
        whole(torch.zeros(3, 11, 16), torch.arange(11).expand(3, -1), state)
    with torch.no_grad():
        state = window.new_state(1, 100)
        for first in range(0, 100, 20):
            window(torch.zeros(1, 20, 16), torch.arange(first, first + 20).unsqueeze(0), state)
    assert (state.seen, state.held, state.num_bytes()) == (100, 6, 2 * 6 * 2 * 8 * 4)


def test_a_cache_turns() -> None:
    cache = KeyValueCache(1, 4, 1, 1, rolls=True, dtype=torch.float32, device=torch.device("cpu"))
    came: list[float] = []
    for size in (1, 2, 1, 3, 1, 9, 1):
        new = torch.arange(len(came), len(came) + size, dtype=torch.float32).view(1, -1, 1, 1)
        came += new.flatten().tolist()
        cache.add(new, -new, torch.arange(size).unsqueeze(0))
        keys, values = cache.newest_last()
        assert keys.flatten().tolist() == came[-4:]
        assert values.flatten().tolist() == [-each for each in came[-4:]]
        slots, _, age = cache.in_use(torch.zeros(1, 1))
        assert [came[-1 - int(each)] for each in age] == slots.flatten().tolist()
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.keys.shape[0] == 3


@pytest.mark.parametrize("length", [3, 8, 9, 11, 12, 13, 25])
def test_a_text_looks_back_on_half_to_all_of_its_context(length: int) -> None:
    start = Row([0] * length, 0).start(8)
    assert start % 4 == 0
    assert length - start <= 8
    assert start == 0 or length - start > 4


def test_a_bounded_context_is_the_full_forward_on_what_it_looks_back_on() -> None:
    model, context = build(), 8
    prompts = [ids(3, 1), ids(21, 2), ids(8, 3)]
    found = model.generate(prompts, 17, temperature=0, context=context)
    for prompt, (written,) in zip(prompts, found, strict=True):
        for place, token in enumerate(written):
            row = Row(prompt + written[:place], 0)
            scores = model.logits(torch.tensor([row.ids[row.start(context) :]]))[0, -1]
            assert token == int(scores.argmax())


def share(sampling: Sampling, scores: list[float], draws: int = 4000) -> list[float]:
    rows = [Row([0], sample) for sample in range(draws)]
    found = draw(torch.tensor([scores]).expand(draws, -1), sampling, rows)
    return [found.count(token) / draws for token in range(len(scores))]


def test_draws_follow_the_odds() -> None:
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert share(Sampling(seed=3), scores.tolist()) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)
    assert share(Sampling(top_k=2), scores.tolist()) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert share(Sampling(top_p=0.69), scores.tolist()) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert share(Sampling(top_p=0.71), scores.tolist()) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.03)
    assert share(Sampling(top_p=1e-9), scores.tolist(), 100) == [0, 1, 0, 0]
    assert share(Sampling(0.5), scores.tolist()) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=0.03)
    assert share(Sampling(0), scores.tolist(), 10) == [0, 1, 0, 0]


@pytest.mark.parametrize(("options", "named"), [
    ({"temperature": -1}, "temperature=-1"), ({"top_k": 0}, "top_k=0"), ({"top_p": 0}, "top_p=0"),
    ({"top_p": 1.5}, "top_p=1.5"), ({"samples": 0}, "samples=0"), ({"prompts": []}, "0 prompts"),
    ({"prompts": [[1], []]}, "prompt 2"), ({"prompts": [[VOCAB]]}, "below 260"), ({"prompts": [[-1]]}, "below 260")])
def test_what_cannot_be_generated_is_said_in_one_line(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build().generate(**{"prompts": [[1]], "num_tokens": 3, **options})
