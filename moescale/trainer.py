"""The loop: batch -> engine -> monitor -> checkpoint."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.audit import Audit
from moescale.checkpoint.capture import Capture, HostCopy
from moescale.checkpoint.remote import RemoteStorage
from moescale.checkpoint.store import latest_checkpoint, read_state
from moescale.cluster.agreement import Agreement
from moescale.cluster.directory import choose_checkpoint, shared_directory
from moescale.cluster.identity import describe_run, refuse_differences
from moescale.cluster.launch import read_launch
from moescale.cluster.recovery import open_memory, recover_from_memory, recover_from_storage
from moescale.cluster.stopping import Order, Orders, StopRequests, die_with_launcher
from moescale.cluster.surroundings import look_around
from moescale.cluster.watchdog import Watchdog
from moescale.config import Config, Stopped, TrainingError, any_of, memory_asked
from moescale.data.batches import Batch, Batches
from moescale.data.token_file import TokenCorpus
from moescale.data.tokenizer import Tokenizer
from moescale.engine.base import StepLosses, build_engine
from moescale.evaluate import Evaluation
from moescale.monitor.output import Output
from moescale.monitor.routing_metrics import routing_metrics
from moescale.monitor.tracer import Tracer
from moescale.optim.base import bytes_of_moments
from moescale.parallel.lost_ranks import name_lost_ranks
from moescale.parallel.mesh import Mesh, start_mesh, stop_mesh
from moescale.planner.cluster import peak_flops
from moescale.planner.count import count_parameters, model_flops_per_token
from moescale.planner.picture import draw_layout
from moescale.record.metrics import FILE
from moescale.resume import Standing, first_batches, go_on, order_text
from moescale.rollback import Decision, Rollbacks
from moescale.saving import Saving
from moescale.start import check_packages, meet, needs_of, prepare

STEPS_AHEAD = 2  # of a device, that the processor may be


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
        checkpoint, damage = choose_checkpoint(ranks, run_dir)
        stands = partial(go_on, config=config, corpus=corpus, tokenizer=tokenizer)
        standing = Standing() if checkpoint is None else ranks.together(lambda: stands(checkpoint))
        standing = replace(standing, notes=(*brought, *standing.notes))
        batches = ranks.together(lambda: first_batches(config, corpus, standing.start))
        config = _without_allowances(config)
        memory = None if kept.in_memory is None else open_memory(ranks, run_dir, kept.memory_dir)
        with _named_memory(config), Watchdog(run_dir, ranks.launch, config.run.timeout_seconds) as watchdog:
            mesh = start_mesh(config, ranks.store)
            saving = partial(Saving, run_dir, kept, mesh, memory, storage, last=checkpoint)
            run = _Run(config, mesh, run_dir, tokenizer, corpus, batches, checkpoint, standing, stands, saving,
                       watchdog, ranks.hosts)
            run.output.tell(*damage)
            for line in (*draw_layout(config, ranks.hosts), *(each.text for each in found if each.level == "warn")):
                run.output.say(line)
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
        state_bytes = 8 * count.total + bytes_of_moments(config)
        advice += [f"a data.seq_len below {data.seq_len}", "more ranks for parallel.dp_shard", "a smaller model"]
        raise TrainingError(f"out of memory: {asked} could not be had, with data.micro_batch={micro_batch}, "
                            f"data.seq_len={data.seq_len} and parallel.recompute={parallel.recompute}; weights, "
                            f"gradients and optimizer state take {state_bytes / 2**30:,.1f} GiB over all ranks: "
                            f"write {any_of(advice)}") from None


def _without_allowances(config: Config) -> Config:
    """Forget what may differ from the checkpoint: it was said for this start, and config.yaml starts others."""
    return config.model_copy(update={"run": config.run.model_copy(update={"allow_changes": ()})})


class _Run:
    """One run on one rank."""

    def __init__(
        self, config: Config, mesh: Mesh, run_dir: Path, tokenizer: Tokenizer, corpus: TokenCorpus, batches: Batches,
        checkpoint: Path | None, standing: Standing, stands: Callable[[Path], Standing], saving: Callable[..., Saving],
        watchdog: Watchdog, hosts: Sequence[str],
    ) -> None:
        """checkpoint: what the run goes on from. standing: where it stands. stands: finds that for another one.

        saving: makes what keeps the run, of whom to tell.
        """
        self.config, self.mesh, self.run_dir, self.tokenizer = config, mesh, run_dir, tokenizer
        self.corpus, self.batches, self.stands, self.watchdog = corpus, batches, stands, watchdog
        self.engine = build_engine(config, mesh)
        if checkpoint is not None:
            self.engine.load(checkpoint, standing.peak)
        self.output = Output(config, run_dir, mesh.rank, self.engine.step_count, checkpoint, self._tokens_left)
        monitor = config.monitor
        self.tracer = Tracer(run_dir, mesh.rank, trace=monitor.trace_steps, profile=monitor.profile_steps,
                             report=self.output.tell)
        self.evaluation = Evaluation(config, mesh, corpus.held_out, tokenizer, run_dir, self.output.tell)
        self.began = time.perf_counter()
        self.under_way: deque[torch.cuda.Event] = deque()
        self.files: dict[str, str | bytes] = {"config.yaml": config.to_yaml(), **tokenizer.files}  # of a checkpoint
        self.saving = saving(saved=self.output.saved, report=self.output.tell)
        self.rollbacks = Rollbacks(config, mesh, run_dir, {} if checkpoint is None else read_state(checkpoint),
                                   spoilt=self.engine.spoilt, saver=self.saving.disk, report=self.output.tell)
        self.audit = Audit(self.engine, mesh, config.run.audit_every, hosts)
        self._greet(checkpoint, standing.notes)

    def loop(self, orders: Orders) -> None:
        """Train to the last step, then leave. Raises Stopped where the run is asked to end before."""
        try:
            self._begin_to_follow()
            while self.engine.step_count < self.config.run.steps:
                self._stretch(orders)
            self.output.summarize()
            self.output.say(f"figures in {self.run_dir}/{FILE}, weights in {latest_checkpoint(self.run_dir)}; "
                            f"try: moescale generate {self.run_dir}")
        except KeyboardInterrupt:  # at once
            raise
        except BaseException:
            self.saving.leave(self.config.run.timeout_seconds)
            raise
        finally:
            self.watchdog.pause("the end")
            self.output.close()
            self.tracer.close()

    def _stretch(self, orders: Orders) -> None:
        """Run up to the next step that is logged, evaluated or saved, and do what falls due there. Raises Stopped."""
        engine, config = self.engine, self.config
        started, first = time.perf_counter(), engine.step_count
        seen: list[Tensor] = []  # of each step its loss and its gradient's norm
        while True:
            step = engine.step_count + 1  # counted from 1: the number of steps done when it is
            last = step == config.run.steps
            log = last or step % config.monitor.every == 0
            evaluate = last or (config.monitor.eval_every is not None and step % config.monitor.eval_every == 0)
            save = last or step % config.checkpoint.every == 0
            copy = not last and self.saving.copies_at(step)
            write = log or evaluate or self._follows(step)
            lr = engine.learning_rate
            self.watchdog.step(step)
            micro_batches = self.batches.micro_batches(
                engine.step_count, self.mesh.batch_rank, self.mesh.batch_size, config.data.micro_batch or 1
            )
            with self.tracer.step(step, engine, [(batch.tokens, batch.token_id) for batch in micro_batches]):
                losses = self._forward_backward(step, micro_batches, watch=write)
                grad_norm = engine.step(losses.cross_entropy if self.rollbacks.skips else None)
            seen.append(torch.stack((losses.cross_entropy, grad_norm)))
            self._wait_for_device()
            self.output.advance(step)
            self.saving.look()
            orders.note_failures(self.saving.disk.failures)
            order = Order() if write else orders.after(step)
            if write or save or copy or order.save or self.audit.is_due(step):
                break
        steps = torch.stack(seen).tolist()
        if self._goes_back(self.rollbacks.decide(first, steps), order):
            return
        if self.audit.is_due(step) and self._goes_back(self.rollbacks.decide_audit(step, self.audit), order):
            return
        self.output.see(loss for loss, _ in steps)
        if write:
            metrics = self._figures(losses, grad_norm, lr, first, started)
            routing = routing_metrics(engine.routing())
            if evaluate or self._follows(step):
                self.watchdog.pause("evaluation")
            moved = self.evaluation.follow(engine) if self._follows(step) else {}
            evaluated = self.evaluation.run(engine) if evaluate else {}
            # the losses above are of the weights before this step
            if self._goes_back(self.rollbacks.decide_held_out(step, evaluated), order):
                return
            self.output.write(step, {**metrics, **routing, **moved, **evaluated})
            order = orders.ask(step)  # an evaluation takes its time
        if copy and not order.stop:
            self.saving.copy(self._capture)
        if save or order.save:
            self.watchdog.pause("saving")
            checkpoint = None
            if order.stop or last:
                checkpoint = self.saving.end(self._capture)
            else:
                self.saving.disk.save(self._capture)
            orders.saved()
            if self._goes_back(self.rollbacks.decide_save(), order):
                return
            if order.stop and not last:
                raise Stopped(f"stopped by {order.stop} after step {step} of {config.run.steps}; the same command goes "
                              f"on from {checkpoint}", order.status)

    def _forward_backward(self, step: int, micro_batches: Sequence[Batch], *, watch: bool) -> StepLosses:
        """Run the passes of a step, again and again where it is audited."""
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        if not self.audit.is_due(step) or step in self.config.monitor.trace_steps:  # which show one run
            return self.engine.forward_backward(batches, watch=watch)
        losses, problem = self.audit.forward_backward(batches, watch=watch)
        if problem is not None:
            self.output.tell(f"audit of step {step}: {problem}")
        return losses

    def _goes_back(self, decision: Decision, order: Order) -> bool:
        """Say what happened, and go back where that was decided. Raises Stopped where the order is to."""
        if decision.back_to is not None:
            self._go_back(decision.back_to, decision)
            if order.stop:
                raise Stopped(f"stopped by {order.stop} after going back to step {self.engine.step_count}; the same "
                              "command goes on from there", order.status)
            return True
        self.output.tell(*decision.notes)
        return False

    def _go_back(self, checkpoint: Path, decision: Decision) -> None:
        """Go on from an earlier checkpoint, around the batches that the run has seen since if that was decided."""
        self.watchdog.pause("going back")
        self.saving.go_back(checkpoint)
        standing = self.stands(checkpoint)
        order = partial(order_text, self.config, self.corpus)
        if decision.around:
            self.batches = self.rollbacks.reorder(order, standing.start, self.engine.step_count, self.batches)
        else:
            self.batches = order(standing.start)
        self.engine.load(checkpoint, standing.peak)
        self.rollbacks.gone_back(checkpoint)
        self.audit.gone_back()
        left_out = self.batches.start.sequences - standing.start.sequences
        *others, cause = decision.notes
        self.output.tell(*others, f"{cause}; went back to step {self.engine.step_count}, and left out {left_out:,} "
                                  "sequences")
        self.output.go_back(self.engine.step_count, checkpoint)
        self._begin_to_follow()

    def _wait_for_device(self) -> None:
        """Let the processor be few steps ahead, so that it hears of a device that hangs, which is never idle for it."""
        if self.mesh.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.under_way.append(event)
            if len(self.under_way) > STEPS_AHEAD:
                self.under_way.popleft().synchronize()

    def _begin_to_follow(self) -> None:
        """Note with what the first look to come is compared, whether the run is resumed or not."""
        if self._follows(self.engine.step_count) and self.engine.step_count < self.config.run.steps:
            self.evaluation.follow(self.engine)

    def _tokens_left(self, step: int) -> int:
        return self.batches.position(self.config.run.steps).tokens - self.batches.position(step).tokens

    def _follows(self, step: int) -> bool:
        """Whether it is time to see how far the routing has moved."""
        every = self.config.monitor.moved_every
        return every is not None and step % every == 0

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
            "load_balance_loss": losses.load_balance.item(),
            "router_z_loss": losses.router_z.item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_per_second": speed,
            "time": round(time.time(), 3),
            "seconds": round(time.perf_counter() - self.began, 3),
            "memory_bytes": self._peak_memory(),
        }
        if self.rollbacks.goes_back:
            figures["rollbacks"] = self.rollbacks.count
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

    def _capture(self, host: HostCopy | None) -> Capture:
        return self.engine.capture(self.files, self._state(), host)

    def _state(self) -> dict[str, Any]:
        """Say how far into which text the run is; the names are a checkpoint's."""
        position = self.batches.position(self.engine.step_count)
        return {"sequences": position.sequences, "tokens": position.tokens, "corpus": self.corpus.fingerprint,
                "tokenizer": self.tokenizer.fingerprint, **self.rollbacks.state}

    def _greet(self, checkpoint: Path | None, notes: Sequence[str]) -> None:
        count = count_parameters(self.config)
        degrees = {key: getattr(self.config.parallel, key) for key in (
            "dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")}
        layout = ", ".join(f"{key} {degree}" for key, degree in degrees.items() if degree > 1)
        self.output.say(
            f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M of them active a token; "
            f"{self.mesh.world_size} ranks{f' ({layout})' if layout else ''} on {self.mesh.device.type}; "
            f"{self.corpus.train.num_tokens / 1e6:,.1f}M tokens of "
            f"{self.corpus.train.num_documents:,} documents, seen {self.batches.epochs(self.config.run.steps):.3g} "
            f"times by step {self.config.run.steps}; into {self.run_dir}"
        )
        for note in self.corpus.notes:
            self.output.say(note)
        if checkpoint is not None:
            left = self.config.run.steps - self.engine.step_count
            self.output.say(f"going on from {checkpoint}" + ("" if left > 0 else
                              f": the run is complete; write run.steps above {self.engine.step_count} for more"))
            for note in notes:
                self.output.say(note)
