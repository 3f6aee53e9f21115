"""What an evaluation keeps of held-out text: each token's kind of file and its experts, in every layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moescale.config import Config, parse_config
from moescale.data.token_file import prepare_tokens
from moescale.engine.native import NativeEngine
from moescale.evaluate import Evaluation
from moescale.monitor.held_out import HeldOutRouting
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks

SEQ, EXPERTS = 32, 12
LETTER = {".py": "p", ".md": "m", ".txt": "t", ".jsonl": "j", "Rust": "r"}  # all that a file of a kind holds


def make_config(folder: Path, parallel: dict[str, Any]) -> Config:
    return parse_config({
        "run": {"dir": str(folder), "steps": 20, "seed": 3},
        "data": {"files": [str(folder / "text/*.*")], "cache_dir": str(folder / "cache"), "held_out": 0.3,
                 "seq_len": SEQ, "global_batch": 8, "micro_batch": 2},
        "model": {"vocab_size": 264, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
                  "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]},
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
    lines = [{"text": "j" * 500}] * 15 + [{"text": "r" * 500, "lang": "Rust"}] * 15
    (text / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))


def evaluate(folder: Path, parallel: dict[str, Any]) -> None:
    config = make_config(folder, parallel)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    Evaluation(config, mesh, prepare_tokens(config.data).held_out, folder).run(engine)
    stop_mesh()


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (4, {"pp": 2, "cp": 2, "ep": 2})], ids=str)
def test_tokens_know_their_kind_of_file(tmp_path: Path, ranks: int, parallel: dict[str, Any]) -> None:
    make_corpus(tmp_path)
    run_ranks(ranks, evaluate, tmp_path, parallel)
    routing = HeldOutRouting.load(tmp_path)
    assert routing is not None
    assert routing.expert.shape == (1, len(routing.pieces), 2)
    assert (routing.expert >= 0).all(-1).tolist() == [(routing.pieces != "").tolist()]
    found = set(zip(routing.pieces.tolist(), routing.kinds.tolist(), strict=True)) - {("", "")}
    starts = {("\N{PILCROW SIGN}", kind) for kind in LETTER}
    assert found - starts == {(letter, kind) for kind, letter in LETTER.items()}, "of all kinds, none mistaken"
    assert len(routing.pieces) <= 4096
