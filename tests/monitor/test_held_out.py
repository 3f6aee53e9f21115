"""What an evaluation keeps of held-out text: each token's kind of file and its experts, in every layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescale.config import Config, parse_config
from moescale.data.token_file import prepare_tokens
from moescale.data.tokenizer import ByteTokenizer, load_tokenizer
from moescale.engine.native import NativeEngine
from moescale.evaluate import Evaluation, shown
from moescale.parallel.expert import moe_layers
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks
from moescale.record.held_out import LIKELY, SHOWN_TOKENS, HeldOutRouting
from moescale.report.content import content_classes, file_kinds
from tests.support.groups import in_groups
from tests.support.tokenizers import write_metaspace

SEQ, EXPERTS = 32, 12
LETTER = {".py": "p", ".md": "m", ".txt": "t", ".jsonl": "j", "Rust": "r"}  # all that a file of a kind holds


def make_config(folder: Path, parallel: dict[str, Any]) -> Config:
    return parse_config({
        "run": {"dir": str(folder), "steps": 20, "seed": 3},
        "data": {"files": [str(folder / "text/*.*")], "cache_dir": str(folder / "cache"), "held_out": 0.3,
                 "seq_len": SEQ, "global_batch": 8, "micro_batch": 4},
        **in_groups({"vocab_size": 264, "d_model": 32, "num_layers": 2,
                     "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
                  "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
        "moe": {"num_experts": EXPERTS, "top_k": 2, "d_ff": 16, "router": "sigmoid_bias"},
        "parallel": parallel, "monitor": {"eval_sequences": 1000},
    }, "test").for_world(world_size())


def make_corpus(folder: Path) -> None:
    """Much of each kind, one after the other in the corpus, compressed or not."""
    text = folder / "text"
    text.mkdir()
    for number in range(20):
        for ending in (".py", ".md", ".txt"):
            content = (LETTER[ending] * (60 + 41 * number)).encode()
            packed = number % 2
            (text / f"{ending[1:]}{number}{ending}{'.gz' if packed else ''}").write_bytes(
                gzip.compress(content) if packed else content)
    lines = [{"text": letter * (480 + number), **named} for letter, named in (("j", {}), ("r", {"lang": "Rust"}))
             for number in range(30)]
    (text / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))


def evaluate(folder: Path, parallel: dict[str, Any]) -> dict[int, Any]:
    """Record the probabilities of each token that this rank's router sees, by token id."""
    config = make_config(folder, parallel)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    evaluation = Evaluation(config, mesh, prepare_tokens(config.data).held_out, ByteTokenizer(), folder, print)
    evaluation.run(engine)
    latest: list[torch.Tensor] = []
    found: dict[int, Any] = {}

    def see(router: Any, inputs: Any, output: Any) -> None:
        token_id = router.sequence.own(inputs[1])
        found.update(zip(token_id.flatten().tolist(), latest.pop().flatten(0, 1).tolist(), strict=True))

    for layer in moe_layers(engine.model):  # one, which some stage of a pipeline holds
        assert layer.router.observers == [layer.statistics.add_probabilities], "as it was"
        layer.router.observe(lambda probs, valid: latest.append(probs))
        layer.router.register_forward_hook(see)
    engine.evaluate(evaluation._batches(1000))
    stop_mesh()
    return found


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (4, {"pp": 2, "cp": 2, "ep": 2})], ids=str)
def test_tokens_know_their_kind_of_file(tmp_path: Path, ranks: int, parallel: dict[str, Any]) -> None:
    make_corpus(tmp_path)
    results = run_ranks(ranks, evaluate, tmp_path, parallel)
    routing = HeldOutRouting.load(tmp_path)
    assert routing is not None
    assert routing.expert.shape == (1, len(routing.pieces), 2)
    assert (routing.expert >= 0).all(-1).tolist() == [(routing.pieces != "").tolist()]
    found = set(zip(routing.pieces.tolist(), routing.kinds.tolist(), strict=True)) - {("", "")}
    starts = {("\N{PILCROW SIGN}", kind) for kind in LETTER}
    assert found - starts == {(letter, kind) for kind, letter in LETTER.items()}, "of all kinds, none mistaken"
    assert len(routing.pieces) <= 4096
    probabilities = {token_id: probs for result in results for token_id, probs in result.items() if token_id >= 0}
    numbers = sorted({token_id // SEQ for token_id in probabilities})
    every = len(numbers) // (4096 // SEQ)
    assert every > 1, "sequences from all of the text"
    assert routing.likely.shape == routing.probability.shape == (1, SHOWN_TOKENS, LIKELY)
    for token in range(SHOWN_TOKENS):
        probs = np.array(probabilities[token // SEQ * every * SEQ + token % SEQ])
        assert routing.likely[0, token].tolist() == np.argsort(-probs, kind="stable")[:LIKELY].tolist()
        assert routing.probability[0, token] == pytest.approx(np.sort(probs)[::-1][:LIKELY], rel=1e-3)


def test_shown_pieces_join_to_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_metaspace(tmp_path / "tokenizer")))
    first, second = (ids.tolist() for ids in tokenizer.encode_batch(["a hello", "hello é a"]))
    pieces = shown(tokenizer, [*first[1:], 2, 1, *second, 2])
    assert len(pieces) == len(first) - 1 + len(second) + 3
    assert "".join(pieces) == "hello\N{PILCROW SIGN}\N{PILCROW SIGN}hello é a\N{PILCROW SIGN}"
    assert "" in pieces, "the first bytes of a character"
    kinds = np.full(len(pieces), ".txt")
    routing = HeldOutRouting(1, np.arange(1), len(pieces), np.array(pieces), kinds, np.zeros((1, len(pieces), 2)),
                             np.zeros((1, len(pieces), 2)), np.zeros((1, 1, 1)), np.zeros((1, 1, 1)))
    assert (content_classes(routing) >= 0).all(), "none is padding"
    assert file_kinds(routing)[1].tolist() == [0] * len(pieces)
