"""The loop: batch -> engine -> monitor -> checkpoint."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.checkpoint.capture import Capture, HostCopy
from moescale.checkpoint.remote import RemoteStorage
from moescale.checkpoint.store import go_back, latest_checkpoint, read_state
from moescale.cluster.agreement import Agreement
from moescale.cluster.directory import choose_checkpoint, shared_directory
from moescale.cluster.identity import describe_run, refuse_differences
from moescale.cluster.launch import read_launch
from moescale.cluster.recovery import open_memory, recover_from_memory, recover_from_storage
from moescale.cluster.stopping import Order, Orders, StopRequests, die_with_launcher
from moescale.cluster.surroundings import look_around
from moescale.config import Config, ConfigError, Stopped, TrainingError, any_of, memory_asked
from moescale.data.batches import Batches, Position
from moescale.data.token_file import TokenCorpus
from moescale.data.tokenizer import Tokenizer
from moescale.engine.base import StepLosses, build_engine
from moescale.evaluate import Evaluation
from moescale.files.writing import replace_text
from moescale.monitor.alerts import Alerts
from moescale.monitor.routing_metrics import routing_metrics
from moescale.monitor.terminal import Terminal
from moescale.monitor.tracer import Tracer
from moescale.monitor.wandb import Wandb
from moescale.optim.base import count_moments
from moescale.parallel.lost_ranks import name_lost_ranks
from moescale.parallel.mesh import Mesh, start_mesh, stop_mesh
from moescale.planner.cluster import peak_flops
from moescale.planner.count import count_parameters, model_flops_per_token
from moescale.planner.picture import draw_layout
from moescale.record.metrics import FILE, JsonLines, Sink
from moescale.resume import Standing, go_on
from moescale.saving import Saving
from moescale.spikes import Spikes, around
from moescale.start import check_packages, meet, needs_of, prepare

LIBRARY_EPOCHS = 50.0  # of Python's own library, which is there to try things out


def train(config: Config | Callable[[], Config]) -> None:
    """Run from the last checkpoint of the run directory, or from the start, to the last step.

    config: or what reads it, which may fail on one rank alone. Raises ConfigError and TrainingError on the rank that is
    to say so, Silenced on the others, and Stopped where the run was asked to end before its last step.
    """
    started, launch = time.monotonic(), read_launch()
    if launch.elastic:
        die_with_launcher()
    ranks = Agreement(launch)
    with StopRequests() as requests:
        try:
            with ranks.one_voice(), requests.told_apart():
                _train(config if callable(config) else lambda: config, ranks, requests, started)
        finally:
            stop_mesh()


def _train(load: Callable[[], Config], ranks: Agreement, requests: StopRequests, started: float) -> None:
    config = meet(load, ranks)
    refuse_differences(ranks, describe_run(config), "start every rank with the same configuration and code")
    ranks.together(lambda: check_packages(config))
    with shared_directory(ranks, config.run.dir) as run_dir:
        found = look_around(ranks, run_dir, needs_of(config, ranks.launch.size))
        tokenizer, corpus = ranks.together(lambda: prepare(config))
        refuse_differences(ranks, {"the tokenizer": tokenizer.fingerprint, "the text": corpus.fingerprint},
                           "give every rank the same files in data.files and data.tokenizer")
        kept = config.checkpoint
        storage = None if kept.url is None else ranks.together(partial(RemoteStorage, kept.url))
        brought = () if kept.in_memory is None else recover_from_memory(ranks, run_dir, kept.memory_dir)
        brought += () if storage is None else recover_from_storage(ranks, run_dir, storage)
        checkpoint = choose_checkpoint(ranks, run_dir)
        stands = partial(go_on, config=config, corpus=corpus, tokenizer=tokenizer)
        standing = Standing() if checkpoint is None else ranks.together(lambda: stands(checkpoint))
        standing = replace(standing, notes=(*brought, *standing.notes))
        batches = ranks.together(lambda: _batches(config, corpus, standing))
        config = _without_allowances(config)
        memory = None if kept.in_memory is None else open_memory(ranks, run_dir, kept.memory_dir)
        with _named_memory(config):
            mesh = start_mesh(config, ranks.store)
            saving = partial(Saving, run_dir, kept, mesh, memory, storage, last=checkpoint)
            run = _Run(config, mesh, run_dir, tokenizer, corpus, batches, checkpoint, standing, stands, saving)
            run.say([*draw_layout(config, ranks.hosts), *(each.text for each in found if each.level == "warn")])
            orders = Orders(requests, mesh.device, save_minutes=config.checkpoint.every_minutes,
                            limit_minutes=config.run.time_limit_minutes, started=started)
            requests.hold()
            try:
                with name_lost_ranks(run.engine.where, config.run.timeout_seconds):
                    run.loop(orders)
            except Stopped as stop:
                ranks.keep_word(stop.status)
                raise


@contextmanager
def _named_memory(config: Config) -> Iterator[None]:
    """Say what was asked for and what to write instead, where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        asked = memory_asked(error)
        if asked is None:
            raise
        data, parallel, count = config.data, config.parallel, count_parameters(config)
        micro_batch = data.micro_batch or 1
        smaller = max((n for n in range(1, micro_batch) if micro_batch % n == 0), default=None)
        advice = [f"data.micro_batch={smaller}"] if smaller else []
        advice += ["parallel.recompute=full"] if parallel.recompute != "full" else []
        state_bytes = 4 * (2 * count.total + count_moments(config))
        advice += [f"a data.seq_len below {data.seq_len}", "more ranks for parallel.dp_shard", "a smaller model"]
        raise TrainingError(f"out of memory: {asked} could not be had, with data.micro_batch={micro_batch}, "
                            f"data.seq_len={data.seq_len} and parallel.recompute={parallel.recompute}; weights, "
                            f"gradients and optimizer state take {state_bytes / 2**30:,.1f} GiB over all ranks: "
                            f"write {any_of(advice)}") from None


def _batches(config: Config, corpus: TokenCorpus, standing: Standing) -> Batches:
    """Order the training text. Raises ConfigError when the run would see it too often."""
    data, steps = config.data, config.run.steps
    batches = _ordered(config, corpus, standing.start)
    epochs = batches.epochs(steps)
    limit = LIBRARY_EPOCHS if data.max_epochs is None and corpus.is_default else data.max_epochs
    if limit is not None and epochs > limit:
        text = "the source of Python's own library" if corpus.is_default else "the text in data.files"
        raise ConfigError(f"run.steps={steps} would see {text}, {corpus.train.num_tokens / 1e6:,.1f}M tokens, "
                          f"{epochs:,.2f} times, and {limit:g} are allowed: name more text in data.files, or write "
                          f"data.max_epochs={math.ceil(epochs)}")
    return batches


def _ordered(config: Config, corpus: TokenCorpus, start: Position) -> Batches:
    data = config.data
    return Batches(corpus.train, seq_len=data.seq_len, global_batch=data.global_batch, seed=config.run.seed,
                   start=start, batch_schedule=data.batch_schedule)


def _without_allowances(config: Config) -> Config:
    """Forget what may differ from the checkpoint: it was said for this start, and config.yaml starts others."""
    return config.model_copy(update={"run": config.run.model_copy(update={"allow_changes": ()})})


class _Run:
    """One run on one rank."""

    def __init__(
        self, config: Config, mesh: Mesh, run_dir: Path, tokenizer: Tokenizer, corpus: TokenCorpus, batches: Batches,
        checkpoint: Path | None, standing: Standing, stands: Callable[[Path], Standing], saving: Callable[..., Saving],
    ) -> None:
        """checkpoint: what the run goes on from. standing: where it stands. stands: finds that for another one.

        saving: makes what keeps the run, of whom to tell.
        """
        self.config, self.mesh, self.run_dir, self.tokenizer = config, mesh, run_dir, tokenizer
        self.corpus, self.batches, self.stands = corpus, batches, stands
        self.engine = build_engine(config, mesh)
        if checkpoint is not None:
            self.engine.load(checkpoint, standing.peak)
        self.spikes = Spikes(config.spikes, {} if checkpoint is None else read_state(checkpoint))
        self.terminal = None if mesh.rank != 0 else Terminal(
            self.engine.step_count, config.run.steps, self._tokens_left)
        self.sinks: list[Sink] = self._open_sinks(checkpoint) if mesh.rank == 0 else []
        monitor = config.monitor
        self.alerts, self.news = self._new_alerts(), list[str]()
        self.tracer = Tracer(run_dir, mesh.rank, trace=monitor.trace_steps, profile=monitor.profile_steps)
        self.evaluation = Evaluation(config, mesh, corpus.held_out, tokenizer, run_dir)
        self.began = time.perf_counter()
        self.highest_loss = torch.full((), -math.inf, dtype=torch.float64, device=mesh.device)  # since the last line
        self.files: dict[str, str | bytes] = {"config.yaml": config.to_yaml(), **tokenizer.files}  # of a checkpoint
        self.saving = saving(saved=self._saved, report=self._report)
        self._greet(checkpoint, standing.notes)

    def say(self, lines: Sequence[str]) -> None:
        """Print lines, on rank 0."""
        if self.terminal is not None:
            for line in lines:
                self.terminal.say(line)

    def loop(self, orders: Orders) -> None:
        """Train to the last step, then leave. Raises Stopped where the run is asked to end before."""
        try:
            self._begin_to_follow()
            while self.engine.step_count < self.config.run.steps:
                self._stretch(orders)
            if self.terminal is not None:
                self.terminal.summarize()
                self.terminal.say(f"figures in {self.run_dir}/{FILE}, weights in "
                                  f"{latest_checkpoint(self.run_dir)}; try: moescale generate {self.run_dir}")
        except KeyboardInterrupt:  # at once
            raise
        except BaseException:
            self.saving.leave(self.config.run.timeout_seconds)
            raise
        finally:
            for sink in self.sinks:
                sink.close()
            self.tracer.close()

    def _stretch(self, orders: Orders) -> None:
        """Run up to the next step that is logged, evaluated or saved, and do what falls due there. Raises Stopped."""
        engine, config = self.engine, self.config
        started, first = time.perf_counter(), engine.step_count
        seen: list[Tensor] = []  # the losses, where spikes are looked for
        while True:
            step = engine.step_count + 1  # counted from 1: the number of steps done when it is
            last = step == config.run.steps
            log = last or step % config.monitor.every == 0
            evaluate = last or (config.monitor.eval_every is not None and step % config.monitor.eval_every == 0)
            save = last or step % config.checkpoint.every == 0
            copy = not last and self.saving.copies_at(step)
            write = log or evaluate or self._follows(step)
            lr = engine.learning_rate
            micro_batches = self.batches.micro_batches(
                engine.step_count, self.mesh.batch_rank, self.mesh.batch_size, config.data.micro_batch or 1
            )
            with self.tracer.step(step, engine, [(batch.tokens, batch.token_id) for batch in micro_batches]):
                losses = engine.forward_backward([batch.to(self.mesh.device) for batch in micro_batches], watch=write)
                grad_norm = engine.step()
            self.highest_loss.copy_(torch.maximum(self.highest_loss, losses.cross_entropy))
            if self.spikes.looks:
                seen.append(losses.cross_entropy)
            if self.terminal is not None:
                self.terminal.advance(step)
            self.saving.look()
            order = Order() if write else orders.after(step)
            if write or save or copy or order.save:
                break
        if self.spikes.looks and self._goes_back(first, [*torch.stack(seen).tolist(), grad_norm.item()]):
            if order.stop:
                raise Stopped(f"stopped by {order.stop} after going back to step {engine.step_count}; the same command "
                              "goes on from there", order.status)
            return
        self._refuse_divergence(loss=losses.cross_entropy.item(), gradient_norm=grad_norm.item())
        if write:
            metrics = self._figures(losses, grad_norm, lr, first, started)
            routing = routing_metrics(engine.routing())
            with self._readable_errors():
                moved = self.evaluation.follow(engine) if self._follows(step) else {}
                evaluated = self.evaluation.run(engine) if evaluate else {}
                self._refuse_divergence(**evaluated)  # the losses above are of the weights before this step
                self._write({**metrics, **routing, **moved, **evaluated})
            order = orders.ask(step)  # an evaluation takes its time
        if copy and not order.stop:
            self.saving.copy(self._capture)
        if save or order.save:
            self.saving.disk.save(self._capture)
            orders.saved()
            checkpoint = self.saving.end() if order.stop or last else None
            if order.stop and not last:
                raise Stopped(f"stopped by {order.stop} after step {step} of {config.run.steps}; the same command goes "
                              f"on from {checkpoint}", order.status)

    def _goes_back(self, first: int, figures: list[float]) -> bool:
        """Look at the losses since step `first`, and at the last gradient's norm; after a spike, go back if possible.

        Rank 0 decides for all ranks.
        """
        *losses, grad_norm = figures
        place = self.spikes.find(losses)
        if place is None and not math.isfinite(grad_norm):
            place = len(losses) - 1
        told = torch.tensor([-1, -1], device=self.mesh.device)
        if self.mesh.rank == 0 and place is not None:
            self.saving.disk.finish()  # the other ranks do so before they load
            to = None
            if self.spikes.known.rollbacks < self.config.spikes.most:
                to = go_back(self.run_dir, first + place + 1 - self.config.spikes.back, self.config.checkpoint.every)
            told = told.new_tensor([place, -1 if to is None else read_state(to)["step"]])
        if self.mesh.world_group is not None:
            dist.broadcast(told, 0, group=self.mesh.world_group)
        spike, step = told.tolist()
        if spike >= 0 and self.spikes.known.rollbacks >= self.config.spikes.most:
            raise TrainingError(f"step {first + spike + 1}: loss {losses[spike]:.3f} is a spike, after the run went "
                                f"back spikes.most={self.config.spikes.most} times: try a lower optim.lr; the last "
                                f"checkpoint is {latest_checkpoint(self.run_dir)}")
        if step < 0:
            self.spikes.take(losses[place:] if place is not None else ())
            return False
        self._go_back(step, f"loss spike: {losses[spike]:.3f} at step {first + spike + 1}")
        return True

    def _go_back(self, step: int, what: str) -> None:
        """Go on from the checkpoint of this step, around the batches that the run has seen since. what: happened"""
        checkpoint, done = self.run_dir / "checkpoints" / f"step_{step:08d}", self.engine.step_count
        self.saving.disk.finish()
        self.saving.forget_copies()
        standing = self.stands(checkpoint)
        before = _ordered(self.config, self.corpus, standing.start)
        start = around(before, done, self.batches, self.config.spikes.skip)
        self.batches = _ordered(self.config, self.corpus, start)
        self.engine.load(checkpoint, standing.peak)
        self.spikes.gone_back(read_state(checkpoint))
        self.alerts = self._new_alerts()
        self.highest_loss.fill_(-math.inf)
        left_out = start.sequences - before.start.sequences
        self.news.append(f"{what}; went back to step {step}, and left out {left_out:,} sequences")
        if self.terminal is not None:
            self.terminal.say(self.news[-1])
            for sink in self.sinks:
                if sink is not self.terminal:
                    sink.close()
            self.sinks = self._open_sinks(checkpoint)
        self._begin_to_follow()

    def _begin_to_follow(self) -> None:
        """Note with what the first look to come is compared, whether the run is resumed or not."""
        if self._follows(self.engine.step_count) and self.engine.step_count < self.config.run.steps:
            self.evaluation.follow(self.engine)

    def _new_alerts(self) -> Alerts:
        monitor = self.config.monitor
        return Alerts(top_k=self.config.moe.top_k, every=monitor.every, dropped_limit=monitor.alert_dropped)

    def _tokens_left(self, step: int) -> int:
        return self.batches.position(self.config.run.steps).tokens - self.batches.position(step).tokens

    def _follows(self, step: int) -> bool:
        """Whether it is time to see how far the routing has moved."""
        every = self.config.monitor.moved_every
        return every is not None and step % every == 0

    def _refuse_divergence(self, **figures: float) -> None:
        """Stop before figures that are no finite numbers are logged or saved."""
        if not all(map(math.isfinite, figures.values())):
            said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
            last = latest_checkpoint(self.run_dir)
            left = "no checkpoint was saved" if last is None else (
                f"the last checkpoint is {last}: remove it to go on from an earlier one if it diverges again")
            raise TrainingError(f"step {self.engine.step_count}: {said}; try a lower optim.lr or a longer "
                                f"optim.warmup_steps; {left}")

    def _figures(
        self, losses: StepLosses, grad_norm: Tensor, lr: float, first: int, started: float
    ) -> dict[str, float]:
        """Gather the figures of the step just done; those of speed are means since step `first`."""
        config, step = self.config, self.engine.step_count
        position = self.batches.position(step)
        speed = (position.tokens - self.batches.position(first).tokens) / (time.perf_counter() - started)
        figures = {
            "tokens": position.tokens,
            "epoch": self.batches.epochs(step),
            "loss": losses.cross_entropy.item(),
            "loss_max": self.highest_loss.item(),
            "load_balance_loss": losses.load_balance.item(),
            "router_z_loss": losses.router_z.item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_per_second": speed,
            "time": round(time.time(), 3),
            "seconds": round(time.perf_counter() - self.began, 3),
            "memory_bytes": self._peak_memory(),
        }
        if self.spikes.looks:
            figures["rollbacks"] = self.spikes.known.rollbacks
        if self.mesh.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(), config.precision.compute)
            if peak is not None:
                figures["mfu"] = model_flops_per_token(config) * speed / (peak * self.mesh.world_size)
        return figures

    def _peak_memory(self) -> int:
        """Give the most memory that a rank has taken so far: of its device, or of its process."""
        device = self.mesh.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        largest = torch.tensor(peak, dtype=torch.int64, device=device)
        if self.mesh.world_group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.mesh.world_group)
        return int(largest)

    def _write(self, metrics: dict[str, Any]) -> None:
        self.highest_loss.fill_(-math.inf)
        if self.sinks:
            alerts = [*self.news, *self.alerts.check(metrics)]
            metrics = {**metrics, "alerts": alerts} if alerts else metrics
        self.news = []
        for sink in self.sinks:
            sink.write(self.engine.step_count, metrics)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"the figures of step {self.engine.step_count} cannot be written to {self.run_dir}: "
                              f"{error.strerror}; the last good checkpoint is "
                              f"{latest_checkpoint(self.run_dir) or 'none'}") from None

    def _saved(self, step: int, checkpoint: Path) -> None:
        """Tell of a checkpoint that is on the disk."""
        for sink in self.sinks:
            sink.saved(step, checkpoint)

    def _report(self, what: str) -> None:
        """Tell of what went wrong, now and as an alert beside the next figures."""
        self.news.append(what)
        if self.terminal is not None:
            self.terminal.say(f"step {self.engine.step_count}: {what}")

    def _capture(self, host: HostCopy | None) -> Capture:
        return self.engine.capture(self.files, self._state(), host)

    def _state(self) -> dict[str, Any]:
        """Say how far into which text the run is; the names are a checkpoint's."""
        position, known = self.batches.position(self.engine.step_count), self.spikes.known
        state = {"sequences": position.sequences, "tokens": position.tokens,
                 "corpus": self.corpus.fingerprint, "tokenizer": self.tokenizer.fingerprint}
        return {**state, "losses": astuple(known)} if self.spikes.looks else state

    def _open_sinks(self, checkpoint: Path | None) -> list[Sink]:
        assert self.terminal is not None
        config = self.config
        try:
            replace_text(self.run_dir / "config.yaml", config.to_yaml())
            lines = JsonLines(self.run_dir, self.engine.step_count + 1)
        except OSError as error:
            raise ConfigError(f"run.dir={self.run_dir} cannot be written: {error.strerror}") from None
        sinks: list[Sink] = [self.terminal, lines]
        mode, project = config.monitor.wandb, config.monitor.wandb_project
        if mode != "off":
            sinks.append(Wandb(self.run_dir, project, mode, config.model_dump(mode="json"), resumed_from=checkpoint,
                               artifacts=config.monitor.wandb_artifacts, say=self.terminal.say))
        return sinks

    def _greet(self, checkpoint: Path | None, notes: Sequence[str]) -> None:
        if self.terminal is None:
            return
        count = count_parameters(self.config)
        degrees = {key: getattr(self.config.parallel, key) for key in (
            "dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")}
        layout = ", ".join(f"{key} {degree}" for key, degree in degrees.items() if degree > 1)
        self.terminal.say(
            f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M of them active a token; "
            f"{self.mesh.world_size} ranks{f' ({layout})' if layout else ''} on {self.mesh.device.type}; "
            f"{self.corpus.train.num_tokens / 1e6:,.1f}M tokens of "
            f"{self.corpus.train.num_documents:,} documents, seen {self.batches.epochs(self.config.run.steps):.3g} "
            f"times by step {self.config.run.steps}; into {self.run_dir}"
        )
        for note in self.corpus.notes:
            self.terminal.say(note)
        if checkpoint is not None:
            left = self.config.run.steps - self.engine.step_count
            self.terminal.say(f"going on from {checkpoint}" + ("" if left > 0 else
                              f": the run is complete; write run.steps above {self.engine.step_count} for more"))
            for note in notes:
                self.terminal.say(note)
