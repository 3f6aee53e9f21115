"""PaLM: its sizes and utilization by calculation; parallel blocks, z-loss, exact restarts and the spike policy."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from frame import ROOT, Criterion, Figures, Reproduction, main
from torch import Tensor
from training import Trainer, library_text, smooth, text_batches, train

from moescale.checkpoint.store import latest_checkpoint
from moescale.config import Config, load_config, parse_config
from moescale.data.batches import Batch
from moescale.engine.base import ENGINES, EngineKind, StepLosses
from moescale.engine.native import NativeEngine
from moescale.layers.positions import rotary_angles
from moescale.ops.rotary import rotate
from moescale.parallel.mesh import Mesh
from moescale.planner.count import count_parameters
from moescale.record.metrics import FILE, read_lines
from moescale.trainer import train as train_run

BATCH, LENGTH, STEPS = 8, 64, 400
MODEL: dict[str, Any] = {"d_model": 96, "num_layers": 3, "norm": "layernorm", "tied_embeddings": True,
                         "scale_logits": True, "pattern": [{"channel_mixer": "feed_forward"}]}
ATTENTION = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 24}
PALM = {"name": "adafactor", "factored": False, "momentum": 0.9, "weight_decay": 1.0, "lr": 1e-2, "clip_norm": 1.0,
        "schedule": "inverse_sqrt", "stable_steps": 100}
SPIKED, SPIKED_STEPS, RUN_STEPS, DEVIATIONS = 150, 3, 200, 6.0  # poisoned from here on, so many; all; a spike
TOKENS_PER_SECOND, PEAK_FLOPS, CHIPS = 238.3e3, 275e12, 6144  # of PaLM 540B (section 4), on TPU v4


def run(seed: int) -> Figures:
    with written_text() as folder:
        figures: Figures = {**calculated(), **restarted(folder, seed), **spiked(folder, seed)}
    for name, keys in (("serial", {}), ("parallel", {"block": "parallel"}), ("z 1e-4", {"z_loss_coefficient": 1e-4}),
                       ("z 1e-2", {"z_loss_coefficient": 1e-2})):
        trainer = Trainer({
            "model": {**MODEL, **keys}, "attention": ATTENTION, "feed_forward": {"d_ff": 384}, "run": {"steps": STEPS},
            "optim": {"lr": 6e-3, "schedule": "wsd", "warmup_steps": 0, "decay_steps": STEPS // 5,
                      "final_lr_share": 0.0}}, seed)
        figures[f"loss {name}"] = smooth(train(trainer, text_batches(seed, BATCH, LENGTH), STEPS))
        batches = list(islice(text_batches(seed, BATCH, LENGTH, held_out=True), 32))
        figures[f"held out {name}"] = trainer.evaluate(batches)
        model = trainer.engine.model
        figures[f"log Z {name}"] = float(torch.cat([model.logits(tokens[:, :-1]).logsumexp(-1).abs()
                                                    for tokens in batches]).mean())
        if name == "parallel":
            figures["unfused"] = difference_from_fused(model, batches[0][:, :-1])
    return figures


@torch.no_grad()
def difference_from_fused(model: Any, tokens: Tensor) -> float:
    """Compute the first block of a LanguageModel in PaLM's fused form, and compare.

    One product makes queries and both inputs of the feed-forward, one keys and values, one the output of both
    sublayers. Returns the largest difference, over the largest value.
    """
    block, x = model.blocks["0"], model.embedding(tokens, torch.float32)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    attention, forward, h = block.mixer, block.channel_mixer, block.mixer_norm(x)
    matrices = [matrix.weight for matrix in (attention.q, forward.gate, forward.up)]
    q, gate, up = F.linear(h, torch.cat(matrices)).split([len(matrix) for matrix in matrices], -1)
    k, v = F.linear(h, torch.cat((attention.k.weight, attention.v.weight))).chunk(2, -1)
    cosine, sine = rotary_angles(positions, ATTENTION["head_dim"], attention.rope_theta)
    q, k, v = (each.unflatten(-1, (-1, ATTENTION["head_dim"])) for each in (q, k, v))
    q, k, v = (each.transpose(1, 2) for each in (rotate(q, cosine, sine), rotate(k, cosine, sine), v))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    both = torch.cat((heads.transpose(1, 2).flatten(2), F.silu(gate) * up), -1)
    fused = x + F.linear(both, torch.cat((attention.o.weight, forward.down.weight), 1))
    return float((block(x, positions, positions)[0] - fused).abs().max() / fused.abs().max())


def calculated() -> Figures:
    """Count the parameters of the shipped configurations, and the utilization that PaLM's speed is."""
    sizes = {size: load_config(ROOT / "configs" / f"palm_{size}.yaml") for size in ("8b", "540b")}
    large = sizes["540b"]
    parameters = count_parameters(large).total
    scores = 12 * large.model.num_layers * large.attention.num_heads * large.attention.head_dim * large.data.seq_len
    rate = 100 * TOKENS_PER_SECOND / (PEAK_FLOPS * CHIPS)
    middle = load_config(ROOT / "configs" / "palm_8b.yaml", [
        "model.d_model=8192", "model.num_layers=64", "attention.num_heads=32", "feed_forward.d_ff=32768"])
    return {"8B": count_parameters(sizes["8b"]).total / 1e9, "62B": count_parameters(middle).total / 1e9,
            "540B": parameters / 1e9, "without attention": rate * 6 * parameters,
            "with attention": rate * (6 * parameters + scores)}


def settings(folder: Path, name: str, seed: int, steps: int, **groups: Any) -> dict[str, Any]:
    return {"run": {"dir": str(folder / name), "seed": seed, "steps": steps},
            "data": {"files": [str(folder / "text.txt")], "cache_dir": str(folder / "cache"), "seq_len": LENGTH,
                     "global_batch": BATCH, "max_epochs": 50.0, "held_out_files": [str(folder / "held_out.txt")]},
            "model": {**MODEL, "vocab_size": 264, "init": "fan_in", "block": "parallel", "z_loss_coefficient": 1e-4},
            "attention": ATTENTION, "feed_forward": {"d_ff": 384}, "optim": PALM,
            "monitor": {"every": 5, "moved_every": None}, **groups}


@contextlib.contextmanager
def written_text() -> Iterator[Path]:
    """Write the text of the runs that read files."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder, text = Path(name), bytes(library_text().tolist())
        (folder / "text.txt").write_bytes(text[:1_000_000].decode("utf-8", "replace").encode())
        (folder / "held_out.txt").write_bytes(text[-100_000:].decode("utf-8", "replace").encode())
        yield folder


def restarted(folder: Path, seed: int) -> Figures:
    """Train 40 steps at once, and 20 that are saved and 20 that go on from there. Returns how many tensors differ."""
    for name, stops in (("at once", (40,)), ("in two", (20, 40))):
        for steps in stops:
            train_run(parse_config(settings(folder, name, seed, steps), "reproduction"))
    states, losses = [], []
    for name in ("at once", "in two"):
        checkpoint = latest_checkpoint(folder / name)
        assert checkpoint is not None
        config = parse_config(settings(folder, name, seed, 40), "reproduction").for_world(1)
        engine = NativeEngine(config, Mesh(0, 0, 1, torch.device("cpu"), config.parallel))
        engine.load(checkpoint)
        states.append({key: tensor.clone() for key, tensor in engine._tensors().items()})
        losses.append([line["loss"] for line in metrics(folder / name)])
    return {"tensors that differ": sum(not torch.equal(value, states[1][key]) for key, value in states[0].items())
            + int(losses[0] != losses[1])}


class Poisoned(NativeEngine):
    """Shuffles the targets of the batches that come at SPIKED, and learns from them at ten times the rate.

    They are poisoned whenever they come; other batches that come at SPIKED after the run went back are not.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.bad, self.is_bad = list[Tensor](), False

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
        (batch,) = batches
        if len(self.bad) < SPIKED_STEPS and self.step_count == SPIKED + len(self.bad):
            self.bad.append(batch.tokens)
        self.is_bad = any(torch.equal(batch.tokens, bad) for bad in self.bad)
        if self.is_bad:
            order = torch.randperm(batch.targets.numel(), generator=torch.Generator().manual_seed(0))
            batch = replace(batch, targets=batch.targets.flatten()[order].view_as(batch.targets))
        return super().forward_backward([batch], watch=watch)

    @property
    def learning_rate(self) -> float:
        return super().learning_rate * (10 if self.is_bad else 1)


def spiked(folder: Path, seed: int) -> Figures:
    """Train, and go on in three ways: as before, and with poisoned batches, the spike policy off and on.

    Returns losses and times that a run went back.
    """
    figures: Figures = {}

    def go_on(name: str, steps: int, deviations: float | None) -> None:
        train_run(parse_config(settings(
            folder, name, seed, steps, checkpoint={"every": 10, "keep": 5},
            spikes={"deviations": deviations, "window": 30, "back": 10, "skip": 20}), "reproduction"))

    go_on("before", SPIKED, DEVIATIONS)
    for name, engine, deviations in (("clean", NativeEngine, None), ("off", Poisoned, None),
                                     ("on", Poisoned, DEVIATIONS)):
        shutil.copytree(folder / "before", folder / name)
        with mock.patch.dict(ENGINES, native=EngineKind(engine)):
            go_on(name, RUN_STEPS, deviations)
        lines = metrics(folder / name)
        figures |= {f"{name} losses": [line["loss"] for line in lines], f"{name} held out": lines[-1]["eval_loss"],
                    f"{name} rollbacks": lines[-1].get("rollbacks", 0)}
    return figures


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of figures that a run wrote."""
    with (run_dir / FILE).open("rb") as file:
        return list(read_lines(file))


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    left, right = figure.subplots(1, 2)
    for index, figures in enumerate(runs):
        for name, color in (("serial", "tab:gray"), ("parallel", "tab:blue"), ("z 1e-2", "tab:green")):
            left.plot(figures[f"loss {name}"], color=color, linewidth=1, label=name if index == 0 else None)
        for name, color in (("off", "tab:red"), ("on", "tab:orange"), ("clean", "tab:gray")):
            losses = figures[f"{name} losses"]
            right.plot([5 * (step + 1) for step in range(len(losses))], losses, color=color, linewidth=1,
                       label=f"spike policy {name}" if name != "clean" else "without a spike" if index == 0 else None)
    left.set(xlabel="step", ylabel="loss (nats)", title="blocks and z-loss", ylim=(1.5, 4))
    right.set(xlabel="step", title="poisoned batches")
    left.legend()


REPRODUCTION = Reproduction(
    title="PaLM",
    paper="Chowdhery et al., 2023",
    claim="540B parameters at 238.3K tokens/s on 6,144 chips use 46.2 % of their FLOPs, 45.7 % without attention; "
          "parallel blocks lose little or nothing; restarts are exact; skipping batches around a spike cures it",
    miniature="the calculation; a 3-layer model of 96 features on bytes of source code, 400 Adam steps of 8 x 64 at "
              "6e-3, the last fifth down to 0, with serial and with parallel blocks and with z-loss; with PaLM's "
              "Adafactor and schedule, a run saved and resumed, and one with three poisoned batches (shuffled targets, "
              "ten times the rate), with the spike policy and without",
    run=run,
    plot=plot,
    criteria=(
        Criterion("parameters of 8B, 62B and 540B, largest distance from 8.632, 62.495 and 540.354 billion",
                  lambda figures: max(abs(figures["8B"] - 8.632), abs(figures["62B"] - 62.495),
                                      abs(figures["540B"] - 540.354)), at_most=0.01),
        Criterion("utilization, largest distance from 45.7 % and 46.2 %",
                  lambda figures: max(abs(figures["without attention"] - 45.7), abs(figures["with attention"] - 46.2)),
                  at_most=0.1),
        Criterion("held-out loss of parallel over serial blocks",
                  lambda figures: figures["held out parallel"] / figures["held out serial"], at_most=1.06),
        Criterion("first parallel block against its fused form, largest difference over the largest value",
                  lambda figures: figures["unfused"], at_most=1e-5),
        Criterion("z-loss of 1e-4: how far the held-out loss moves",
                  lambda figures: abs(figures["held out z 1e-4"] - figures["held out serial"]), at_most=0.01),
        Criterion("z-loss of 1e-4: |log Z| over that without",
                  lambda figures: figures["log Z z 1e-4"] / figures["log Z serial"], at_most=1.0),
        Criterion("z-loss of 1e-2: |log Z| over that without",
                  lambda figures: figures["log Z z 1e-2"] / figures["log Z serial"], at_most=0.55),
        Criterion("tensors that differ after a restart", lambda figures: figures["tensors that differ"], equals=0),
        Criterion("spike policy on: held-out loss over that without a spike",
                  lambda figures: figures["on held out"] / figures["clean held out"], at_most=1.03),
        Criterion("spike policy on: times that the run went back", lambda figures: figures["on rollbacks"], equals=1),
        Criterion("spike policy off: held-out loss over that without a spike",
                  lambda figures: figures["off held out"] / figures["clean held out"], at_least=1.1),
    ),
)

if __name__ == "__main__":
    main(REPRODUCTION)
