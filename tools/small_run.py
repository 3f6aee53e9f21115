"""The small run that tools train on simulated hosts: the words of a command line, to which each adds its own."""

SPOILT_EVERY = 25  # steps, of which tools/spoilt_run.py spoils the last
SMALL_RUN = [
    "configs/quickstart.yaml",
    "data.files=[docs/*.md]",
    "data.seq_len=64",
    "data.global_batch=8",
    "data.micro_batch=null",
    "model.d_model=64",
    "attention.num_kv_heads=4",
    "attention.head_dim=16",
    "attention.window=null",
    "moe.d_ff=64",
    "monitor.every=1",
    "monitor.eval_every=null",
]
