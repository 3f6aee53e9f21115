"""`moescale doctor`: all that a run checks before its first step, and the speed of network and disk, without it."""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moescale.checkpoint.remote import RemoteStorage
from moescale.cluster.agreement import Agreement
from moescale.cluster.directory import choose_checkpoint, shared_directory
from moescale.cluster.identity import describe_run, refuse_differences
from moescale.cluster.launch import read_launch
from moescale.cluster.recovery import try_memory
from moescale.cluster.stopping import die_with_launcher
from moescale.cluster.surroundings import Finding, Needs, look_around
from moescale.config import Config, ConfigError, TrainingError
from moescale.files.writing import write_synced
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.planner.picture import draw_layout
from moescale.resume import Standing, first_batches, go_on
from moescale.start import check_packages, meet, needs_of, prepare

LINK_BYTES = 2**24  # that each rank sends its neighbour at a time
LINK_TRIES = 5
SLOW_LINK = 0.25  # of the median of its kind, below which a link is named
DISK_BYTES = 2**25  # that each rank writes
Measured = list[list[float]]


def examine(load: Callable[[], Config], say: Callable[[str], None]) -> bool:
    """Run every check, on all ranks that were started, and say a line for each on rank 0. Returns whether all passed.

    load: reads the configuration, which may fail on one rank alone.
    """
    launch = read_launch()
    if launch.elastic:
        die_with_launcher()
    ranks = Agreement(launch)
    doctor = _Doctor(ranks, say)
    try:
        with ranks.one_voice():
            doctor.examine(load)
    finally:
        stop_mesh()
    return not doctor.failed


class _Doctor:
    """The checks, of which a later one is left out where one that it needs has failed."""

    def __init__(self, ranks: Agreement, say: Callable[[str], None]) -> None:
        self.ranks, self.failed = ranks, False
        self._checkpoint: Path | None = None  # that a run would go on from
        self._storage: RemoteStorage | None = None
        self._say = say if ranks.launch.rank == 0 else lambda _: None

    def examine(self, load: Callable[[], Config]) -> None:
        ranks, settled = self.ranks, list[Config]()
        if not self._passes("ranks", lambda: self._meet(load, settled)):
            return
        (config,) = settled
        for line in draw_layout(config, ranks.hosts):
            self._say(f"      {line}")
        self._passes("sameness", lambda: self._compare(config))
        self._passes("packages", lambda: self._check_packages(config))
        self._passes("run.dir", lambda: self._enter(config))
        self._passes("copies", lambda: self._try_memory(config))
        self._passes("text", lambda: self._read_text(config))
        self._passes("network", lambda: self._measure_network(config))

    def _passes(self, check: str, work: Callable[[], Iterable[Finding | str]]) -> bool:
        """Do one check, whose lines are findings or what is good. Returns whether it raised nothing."""
        try:
            for found in work():
                self._tell(found if isinstance(found, Finding) else Finding(check, "ok", found))
        except (ConfigError, TrainingError) as error:
            if self.ranks.store is None and not self.ranks.alone:
                raise  # ranks that did not meet each speak for themselves
            self._tell(Finding(check, "fail", str(error)))
            return False
        return True

    def _tell(self, found: Finding) -> None:
        self.failed |= found.level == "fail"
        self._say(f"{found.level:4}  {found.check}: {found.text}")

    def _meet(self, load: Callable[[], Config], settled: list[Config]) -> Iterable[str]:
        began = time.perf_counter()
        settled.append(meet(load, self.ranks))
        hosts = len(set(self.ranks.hosts))
        yield (f"{self.ranks.launch.size} on {hosts} host{'s' if hosts > 1 else ''} met within "
               f"{time.perf_counter() - began:.1f} s; the configuration fits them")

    def _compare(self, config: Config) -> Iterable[str]:
        refuse_differences(self.ranks, describe_run(config), "start every rank with the same configuration and code")
        yield "configuration, code and versions are the same on every rank"

    def _check_packages(self, config: Config) -> Iterable[str]:
        self.ranks.together(lambda: check_packages(config))
        url = config.checkpoint.url
        self._storage = None if url is None else self.ranks.together(lambda: RemoteStorage(url))
        yield "those that the configuration asks for are there"

    def _enter(self, config: Config) -> Iterable[Finding | str]:
        """See what the run directory offers: whether all see it, room, speed, and what a run would go on from."""
        ranks, needs = self.ranks, needs_of(config, self.ranks.launch.size)
        with shared_directory(ranks, config.run.dir) as run_dir:
            self._checkpoint, damage = choose_checkpoint(ranks, run_dir, rename=False)
            yield from (Finding("run.dir", "warn", line) for line in damage)
            yield f"every rank sees {config.run.dir}, {self._beginning()}"
            yield from look_around(ranks, run_dir, needs)
            yield self._measure_disk(run_dir, needs, config.checkpoint.timeout_seconds)

    def _beginning(self) -> str:
        """Say where a run begins. Raises ConfigError where a storage that it would look into cannot be read."""
        if self._checkpoint is not None:
            return f"where a run goes on from {self._checkpoint.name}"
        storage = self._storage
        stored = None if storage is None else self.ranks.on_first(lambda: max(storage.steps(), default=None))
        if storage is None or stored is None:
            return "where a new run would begin"
        return f"where a run would begin with step {stored} of {storage.url}"

    def _try_memory(self, config: Config) -> Iterable[str]:
        kept = config.checkpoint
        if kept.in_memory is not None:
            try_memory(self.ranks, Path(config.run.dir).expanduser(), kept.memory_dir)
            yield f"every host can keep them in checkpoint.memory_dir={kept.memory_dir}"

    def _measure_disk(self, run_dir: Path, needs: Needs, limit_seconds: float) -> Finding:
        """Let all ranks write at the same time, as they do for a checkpoint."""
        ranks, file = self.ranks, run_dir / f".doctor-{secrets.token_hex(6)}"
        content = os.urandom(DISK_BYTES)
        ranks.settle(None, len)
        try:
            seconds = ranks.together(lambda: [_timed(partial(_write, file, content)), _timed(partial(_read, file))])
        finally:
            file.unlink(missing_ok=True)
        slowest: Measured = ranks.settle(seconds, lambda said: [[max(each) for each in zip(*said, strict=True)]])
        write, read = (DISK_BYTES * ranks.launch.size / each for each in slowest[0])
        needed = needs.checkpoint_bytes / write
        text = (f"all ranks together write {_speed(write)} and read {_speed(read)} there: a checkpoint of "
                f"{needs.checkpoint_bytes / 1e9:,.2f} GB takes about {needed:,.1f} s")
        if needed <= limit_seconds:
            return Finding("disk speed", "ok", text)
        return Finding("disk speed", "warn", f"{text}: raise checkpoint.timeout_seconds={limit_seconds:g} above that")

    def _read_text(self, config: Config) -> Iterable[str]:
        """Read and tokenize the text as a run does, which keeps the tokens, and compare it with a checkpoint's."""
        ranks = self.ranks
        tokenizer, corpus = ranks.together(lambda: prepare(config))
        refuse_differences(ranks, {"the tokenizer": tokenizer.fingerprint, "the text": corpus.fingerprint},
                           "give every rank the same files in data.files and data.tokenizer")
        yield (f"{corpus.train.num_tokens:,} tokens of {corpus.train.num_documents:,} documents to train on, the same "
               "on every rank")
        yield from corpus.notes
        checkpoint, standing = self._checkpoint, Standing()
        if checkpoint is not None:
            standing = ranks.together(lambda: go_on(checkpoint, config, corpus, tokenizer))
            yield f"the run can go on from {checkpoint.name}"
            yield from standing.notes
        ranks.together(lambda: first_batches(config, corpus, standing.start))

    def _measure_network(self, config: Config) -> Iterable[Finding | str]:
        ranks = self.ranks
        if ranks.launch.size == 1:
            yield "one process needs none"
            return
        mine = ranks.together(lambda: _connect_and_measure(config, ranks))
        links: Measured = ranks.settle(mine, list)
        yield from judge_links([LINK_BYTES / link[0] for link in links], ranks.hosts)
        slowest = max(link[1] for link in links)
        yield f"a sum of one number over all ranks takes {slowest * 1e3:,.2f} ms"


def judge_links(speeds: Sequence[float], hosts: Sequence[str]) -> list[Finding]:
    """Say how fast each rank sends to the next, within hosts and between them. speeds: bytes a second"""
    found = []
    for where, between in (("within hosts", False), ("between hosts", True)):
        links = [(speed, rank) for rank, speed in enumerate(speeds)
                 if (hosts[rank] != hosts[(rank + 1) % len(hosts)]) is between]
        if not links:
            continue
        middle, (slowest, rank) = statistics.median(speed for speed, _ in links), min(links)
        neighbour = (rank + 1) % len(hosts)
        text = (f"neighbours {where} send {_speed(middle)}, the slowest rank {rank} ({hosts[rank]}) to rank "
                f"{neighbour} ({hosts[neighbour]}) {_speed(slowest)}")
        slow = slowest < SLOW_LINK * middle
        found.append(Finding("network", "warn" if slow else "ok", text + (": look at that link" if slow else "")))
    return found


def _connect_and_measure(config: Config, ranks: Agreement) -> list[float]:
    """Connect this rank with all others, as a run does, and measure its link. Raises ConfigError where that fails."""
    try:
        return _measure_link(start_mesh(config, ranks.store).device)
    except RuntimeError as error:
        raise ConfigError(f"ranks cannot exchange tensors: {' '.join(str(error).split())[:200]}: open all ports "
                          "between the nodes, and see docs/operations.md for the interfaces that gloo and NCCL "
                          "take") from None


def _measure_link(device: torch.device) -> list[float]:
    """Send to the next rank while the one before sends here, all ranks at once; then add up one number.

    Returns the median of the seconds that each took.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    sent, received = (torch.ones(LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    one = torch.ones(1, device=device)

    def exchange() -> None:
        work = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, (rank + 1) % size),
                                       dist.P2POp(dist.irecv, received, (rank - 1) % size)])
        for each in work:
            each.wait()
        _finish(device)

    def add_up() -> None:
        dist.all_reduce(one)
        _finish(device)

    medians = []
    for work in (exchange, add_up):
        work()  # the first one connects
        medians.append(statistics.median(_timed(work) for _ in range(LINK_TRIES)))
    return medians


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _write(file: Path, content: bytes) -> None:
    try:
        write_synced(file, content)
    except OSError as error:
        raise ConfigError(f"{file.parent} cannot be written: {error.strerror}") from None


def _read(file: Path) -> None:
    """Read a file back from the disk, and not from memory where that can be had."""
    with file.open("rb") as source:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        source.read()


def _speed(speed: float) -> str:
    return f"{speed / 1e9:,.2f} GB/s" if speed >= 1e9 else f"{speed / 1e6:,.1f} MB/s"
