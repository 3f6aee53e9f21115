"""The groups of a run: frozen models, each of which refuses what cannot work within it.

The sentence below a key is what `moescale config` shows of it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moescale.errors import check_local, refuse
from moescale.spec.group import Group

LocalPath = Annotated[str, AfterValidator(check_local)]
LONGEST_SECONDS = 7 * 24 * 3600  # of what waits; a longer time is one that was mistyped


def _check_project(name: str) -> str:
    refuse(not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", name), "a project in wandb has a name of 1 to 128 letters "
           "without / \\ # ? % and :; the team it belongs to is not part of it, but WANDB_ENTITY in the environment")
    return name


def _check_storage(url: str | None) -> str | None:
    refuse(url is not None and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s?#]+", url) is None,
           "write a URL such as s3://bucket/run, or null")
    refuse(url is not None and "@" in url, "a URL with a password or key would be kept in config.yaml and shown: give "
           "it to the storage's own package, for S3 e.g. in AWS_PROFILE or ~/.aws/credentials")
    return url


class RunConfig(Group):
    engine: Literal["native", "deepspeed", "megatron"] = "native"
    """What runs the steps: torch's own FSDP2, pipelines and checkpoints; DeepSpeed's ZeRO; or Megatron-Core."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """What DeepSpeed shares out: 1 optimizer state, 2 gradients too, 3 weights too; null is run.deepspeed's, or 3."""
    deepspeed: LocalPath | None = None
    """A JSON file of DeepSpeed's own settings, such as bucket sizes and offload."""
    dir: LocalPath = "runs/default"
    """The folder that checkpoints, metrics.jsonl and config.yaml go to."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides the first weights, the order of the data and every random draw."""
    steps: int = Field(1000, ge=1)
    """Steps to train, in all."""
    timeout_seconds: float = Field(300.0, ge=1, le=LONGEST_SECONDS)
    """A rank that waits longer than this for the others ends the run."""
    time_limit_minutes: float | None = Field(None, gt=0, le=LONGEST_SECONDS / 60)
    """Minutes after its start at which the run finishes its step, saves and leaves with exit status 75."""
    audit_every: int | None = Field(None, ge=1)
    """Steps between two run twice and compared bit by bit, as are copies of weights and moments; null audits none."""
    allow_changes: tuple[str, ...] = ()
    """Keys or groups that may differ from the checkpoint's when a run goes on, this once, e.g. [attention.window]."""


class DataConfig(Group):
    files: tuple[LocalPath, ...] = ()
    """Paths and globs of the training text; none is the source of the running Python's own standard library."""
    weights: tuple[float, ...] = ()
    """Shares of the sequences that the entries of data.files get, e.g. [0.7, 0.3]; none is by the length of each."""
    tokenizer: LocalPath | None = "bytes"
    """`bytes`, or the path of a Hugging Face tokenizer.json; null is not known, of a model that came without one."""
    begin_token: str | None = None
    """The token before each document, by name; null is what the files beside the tokenizer.json say."""
    end_token: str | None = None
    """The token after each document, by name; null is what those files say. One token may do both."""
    cache_dir: LocalPath = "~/.cache/moescale"
    """The folder that tokenized text is kept in."""
    seq_len: int = Field(256, ge=1)
    """Tokens in a training sequence."""
    global_batch: int = Field(16, ge=1)
    """Sequences in a step, over all ranks."""
    batch_schedule: tuple[tuple[int, int], ...] = ()
    """Steps after which global_batch is another number, e.g. [[50000, 1024], [115000, 2048]]."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences in one pass of a rank, at most its share, which null is; more passes add up their gradients."""
    held_out: float = Field(0.02, gt=0, lt=1)
    """Share of the documents that is kept for evaluation and never trained on, chosen by a hash of each one's text."""
    held_out_files: tuple[LocalPath, ...] = ()
    """Paths and globs of text to evaluate on instead; data.held_out then takes nothing from data.files."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the document."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """What happens to documents that cannot be read: the first ends the run, or they are left out and counted."""
    max_epochs: float | None = Field(None, gt=0)
    """Times that the training text may be seen; null is 50 for Python's own library and no limit for data.files."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("begin_token", "end_token"):
            refuse(self.tokenizer == "bytes" and getattr(self, key) is not None,
                   f"data.{key}={getattr(self, key)} means nothing to data.tokenizer=bytes: write data.{key}=null, or "
                   "data.tokenizer=PATH of a tokenizer.json that has this token")
        refuse(bool(self.weights) and (len(self.weights) != len(self.files) or min(self.weights) <= 0),
            f"data.weights={list(self.weights)} must be a number above 0 for each of the {len(self.files)} entries of "
            "data.files, e.g. [0.7, 0.3] for two, or [] for none")
        steps = [0, *(step for step, _ in self.batch_schedule)]
        refuse(steps != sorted(set(steps)) or min(self.batches) < 1,
               f"data.batch_schedule={[list(each) for each in self.batch_schedule]}: write pairs of a step and a "
               "number of sequences, each step later than the one before, e.g. [[50000, 1024], [115000, 2048]]")
        return self

    @property
    def batches(self) -> tuple[int, ...]:
        """The numbers of sequences that steps have, one after another."""
        return (self.global_batch, *(batch for _, batch in self.batch_schedule))


class ParallelConfig(Group):
    dp_replicate: int = Field(1, ge=1)
    """Copies of the sharded model (HSDP)."""
    dp_shard: int = Field(-1, ge=-1)
    """Ranks that share one copy of the model (FSDP2); -1 is all that are left."""
    tp: int = Field(1, ge=1)
    """Ranks that share each matrix of attention, dense feed-forward, embedding and head."""
    cp: int = Field(1, ge=1)
    """Ranks that share each sequence."""
    pp: int = Field(1, ge=1)
    """Ranks in a row, each with layers of about equal cost."""
    ep: int = Field(1, ge=1)
    """Ranks that share the experts of a layer."""
    etp: int = Field(1, ge=1)
    """Ranks that share each expert."""
    dispatcher: Literal["all_to_all", "hierarchical", "all_gather"] = "all_to_all"
    """How tokens travel to their experts: straight, among the nodes first, or all tokens to all ranks."""
    dispatch_chunks: int = Field(1, ge=1)
    """Parts in which tokens travel, each while the experts compute another."""
    node_ranks: int | None = Field(None, ge=1)
    """Ranks of one node, for `hierarchical`; null is as many as were started there."""
    row_budget: float | None = Field(None, gt=0)
    """Rows that a rank's experts take at a time, over an even share; null is all."""
    over_budget: Literal["passes", "drop"] = "passes"
    """What happens to rows beyond row_budget: further passes, or the lightest are dropped in training."""
    elastic: bool = False
    """Whether degrees fall to smaller ones where those that are written do not fit the ranks that were started."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    """The order of passes in a pipeline."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What runs again in backward to save memory: feed-forwards and experts, or whole blocks."""
    compile: bool = False
    """Whether blocks are compiled by torch.compile."""

    @property
    def pp_stages(self) -> int:
        """Pieces that the layers are cut into; schedules that interleave give each rank two of them."""
        return self.pp * (2 if self.pp > 1 and self.pp_schedule in ("interleaved_1f1b", "zero_bubble") else 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.dp_shard == 0, "parallel.dp_shard=0: write -1 for all ranks that are left, or a number from 1")
        refuse(self.over_budget == "drop" and self.row_budget is None,
               "parallel.over_budget=drop drops rows beyond parallel.row_budget: write e.g. parallel.row_budget=1.5")
        return self


OPTIMIZER_KEYS = {"adamw": ("betas", "eps", "moments"), "adafactor": ("factored", "momentum", "clip_update")}
"""The keys of `optim` that one optimizer alone has."""
SCHEDULE_KEYS = {"inverse_sqrt": ("stable_steps",), "wsd": ("decay_steps",)}


class OptimConfig(Group):
    name: Literal["adamw", "adafactor"] = "adamw"
    """The optimizer: AdamW, or Adafactor, whose learning rate is relative to the size of each matrix (PaLM: 1e-2)."""
    lr: float = Field(1e-3, gt=0)
    """The learning rate after warmup, the highest of the run; A, B and steps of S4 have at most 0.001."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How slowly AdamW's means of gradients and of their squares move."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What AdamW's moments are kept in; in bfloat16, half the bytes, each is rounded stochastically."""
    factored: bool = True
    """Whether Adafactor keeps second moments of a matrix as means of rows and columns; PaLM keeps all."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """How slowly Adafactor's mean of updates moves (PaLM: 0.9); 0 keeps none."""
    clip_update: float | None = Field(1.0, gt=0)
    """The largest root mean square of Adafactor's update of a matrix, before it is scaled; null limits none."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, never on norms and embeddings: times lr, under Adafactor times lr squared (PaLM: 1)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate falls after warmup: `wsd` in a line over the last steps; `inverse_sqrt` as PaLM's."""
    final_lr_share: float = Field(0.1, ge=0, le=1)
    """The last step's learning rate, over lr; constant and inverse_sqrt have none."""
    stable_steps: int = Field(0, ge=0)
    """First step after which inverse_sqrt falls, as one over the root of the step; at least warmup_steps."""
    decay_steps: int = Field(0, ge=0)
    """Steps at the end in which wsd falls."""
    clip_norm: float | None = Field(1.0, gt=0)
    """The largest norm of the gradient over all parameters; null clips nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(not all(0 <= beta < 1 for beta in self.betas),
                f"optim.betas={list(self.betas)}: both must be at least 0 and below 1, e.g. [0.9, 0.95]")
        for of, kinds in (("name", OPTIMIZER_KEYS), ("schedule", SCHEDULE_KEYS)):
            for kind, keys in kinds.items():
                for key in keys if kind != getattr(self, of) else ():
                    value, usual = getattr(self, key), type(self).model_fields[key].default
                    refuse(value != usual, f"optim.{key} means nothing to optim.{of}={getattr(self, of)}: leave it "
                           f"out, or write optim.{of}={kind}")
        refuse(self.schedule == "wsd" and self.decay_steps == 0,
               "optim.schedule=wsd falls in the last optim.decay_steps: write e.g. optim.decay_steps=1000")
        return self


class PrecisionConfig(Group):
    compute: Literal["float32", "bfloat16", "float64"] = "float32"
    """What matrices multiply in; weights and gradients stay float32; float64 is for proofs."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """What ranks of dp_shard and cp send each other of gradients; they are added up in float32 all the same."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.compute == "float64" and self.reduce != "float32", f"precision.reduce={self.reduce} rounds what "
               "precision.compute=float64 keeps: write precision.reduce=float32")
        return self


class CheckpointConfig(Group):
    every: int = Field(1000, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    every_minutes: float | None = Field(None, gt=0, le=LONGEST_SECONDS / 60)
    """Minutes after the last checkpoint at which another one is written, beside those that steps ask for."""
    keep: int = Field(3, ge=1)
    """Checkpoints that are kept, the newest ones."""
    background: bool = True
    """Whether checkpoints are written while training goes on, from a copy of weights and moments in host memory."""
    url: Annotated[str | None, AfterValidator(_check_storage)] = None
    """Where each checkpoint is copied to as well, by URL, e.g. s3://bucket/run; a run.dir without any begins there."""
    in_memory: int | None = Field(None, ge=1)
    """Steps between two copies in the memory of hosts, from which a restarted run goes on; null keeps none."""
    memory_dir: LocalPath = "/dev/shm"
    """The folder of each host for these copies, on a file system in memory."""
    timeout_seconds: float = Field(1800.0, ge=1, le=LONGEST_SECONDS)
    """A rank that waits longer than this for the others to write or read a checkpoint ends the run."""


class SpikesConfig(Group):
    deviations: float | None = Field(None, gt=0)
    """Standard deviations above its running mean from which on a loss is a spike; null looks for none."""
    window: int = Field(100, ge=2)
    """Steps that the running mean is over; before there are so many, no loss is a spike."""
    not_finite: Literal["stop", "skip", "back"] | None = None
    """What follows a loss, gradient norm or state to save that is not finite: stop, skip the update, or go back."""
    back: int = Field(100, ge=1)
    """Steps before a spike that the checkpoint must be at least, to which the run goes back (PaLM: 100)."""
    skip: int = Field(300, ge=1)
    """Batches after that checkpoint that are left out, and all that were seen up to the spike (PaLM: 200 to 500)."""
    most: int = Field(20, ge=1)
    """Times that a run goes back, or updates in a row that it skips, at most; the next such step ends it."""

    @property
    def on_not_finite(self) -> Literal["stop", "skip", "back"]:
        """What follows what is no finite number; null goes back where spikes are looked for, and stops elsewhere."""
        return self.not_finite or ("stop" if self.deviations is None else "back")


class MonitorConfig(Group):
    every: int = Field(10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between two evaluations; null is after the last step only."""
    eval_sequences: int = Field(64, ge=1)
    """Held-out sequences in an evaluation."""
    moved_every: int | None = Field(50, ge=1)
    """Steps between two looks at how far routing moved; null never looks."""
    alert_dropped: float = Field(0.5, ge=0, le=1)
    """Share of the choices that may have no row before an alert."""
    trace: str | None = None
    """`steps:10-12` writes each token's experts and weights in these steps to Parquet files."""
    profile: str | None = None
    """`steps:5-7` writes the time of each operation in these steps, for Perfetto."""
    wandb: Literal["off", "auto", "offline", "online"] = "off"
    """Whether Weights & Biases gets the figures; `auto` is online where there is a key, else offline."""
    wandb_project: Annotated[str, AfterValidator(_check_project)] = "moescale"
    """The project that runs belong to in Weights & Biases."""
    wandb_artifacts: bool = False
    """Whether configuration, code and the place of each checkpoint are kept there."""

    @property
    def trace_steps(self) -> range:
        return _steps("trace", self.trace)

    @property
    def profile_steps(self) -> range:
        return _steps("profile", self.profile)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _steps("trace", self.trace)
        _steps("profile", self.profile)
        refuse(self.wandb_artifacts and self.wandb == "off",
               "monitor.wandb_artifacts=true needs wandb: write monitor.wandb=auto, offline or online too")
        return self


def _steps(key: str, text: str | None) -> range:
    """Read `steps:10-12`, the last one included."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"steps:(\d+)(?:-(\d+))?", text)
    first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    refuse(not 1 <= first <= last, f"monitor.{key}={text}: write the first and the last step, e.g. steps:10-12")
    return range(first, last + 1)
