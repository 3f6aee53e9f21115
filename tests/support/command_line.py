"""A configuration that trains within seconds, and where the project lies."""

from __future__ import annotations

from pathlib import Path

from tests.support.groups import in_groups

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "run": {"steps": 40},
    "data": {"files": ["text/*.txt"], "cache_dir": "cache", "seq_len": 32, "global_batch": 4, "micro_batch": 2},
    **in_groups({"vocab_size": 264, "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
              "init": "fan_in"}),
    "moe": {"num_experts": 4, "top_k": 2, "d_ff": 32},
    "optim": {"lr": 5e-3, "warmup_steps": 3},
    "checkpoint": {"every": 5, "keep": 3}, "monitor": {"every": 1, "eval_sequences": 4},
}
