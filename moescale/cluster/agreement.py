"""What the ranks of a run settle through a key-value store, before any of them computes and when one of them ends.

The store is the launcher's, or rank 0 keeps it. It is asked in short looks, never waited for inside the library, so
that signals are heard, a rank that ends is noticed, and preparing may take hours: a rank that lives says so every few
seconds. Ranks that a launcher starts again find the store as those before them left it; they meet anew under a token
of their own, and everything else, torch's own keys included, lies below that.
"""

from __future__ import annotations

import errno
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from moescale.cluster.launch import Launch
from moescale.cluster.listening import serve_store
from moescale.config import ConfigError, LostRanksError, Silenced, Stopped, TrainingError, is_of_lost_ranks

T = TypeVar("T")
STORE_SECONDS = 30.0  # for one answer of the store
NAME_SECONDS = 60.0  # until the name of rank 0's host is known
BEAT_SECONDS = 2.0
HESITATE_SECONDS = 0.5  # of ranks other than 0, so that what all of them notice is said by rank 0
FAREWELL_SECONDS = 5.0
STOPPED = "stopped"
CANNOT_LISTEN = {
    errno.EADDRINUSE: "this port is in use: write another MASTER_PORT",
    errno.EADDRNOTAVAIL: "this is no address of rank 0's machine: write one that it has",
}
EXIT_STATUS = ((ConfigError, 2), (KeyboardInterrupt, 130))


class Agreement:
    """What all ranks settle together, on the side of this rank; one process without a launcher settles alone."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.alone = launch.size == 1 and not launch.keeps_store
        self.store: PrefixStore | None = None  # of these ranks, this attempt; None until they have met
        self.hosts: list[str] = [launch.host]  # of each rank
        self._kept: PrefixStore | None = None  # what outlives an attempt, where the launcher keeps the store
        self._server: TCPStore | None = None
        self._rounds = 0
        self._patience = STORE_SECONDS
        self._beating = threading.Event()

    # ---- meeting

    def meet(self, timeout_seconds: float) -> None:
        """Find all other ranks. Raises ConfigError where they do not come in time, or cannot."""
        if self.alone:
            return
        launch, deadline = self.launch, time.monotonic() + timeout_seconds
        self._patience = timeout_seconds
        base = self._connect(deadline, timeout_seconds)
        self._kept = PrefixStore(f"moescale/{launch.run_id}", base)
        if launch.restarts > 0 and self._kept.check([STOPPED]):
            word = json.loads(self._kept.get(STOPPED))
            if word["size"] == launch.size:  # else torchrun asked them to, since nodes came or went
                raise Silenced(word["status"])  # the attempt before left when asked to: no reason to restart
        mine = secrets.token_hex(8)
        token = self._gather_roster(mine, deadline) if launch.rank == 0 else self._find_roster(mine, deadline)
        self.store = PrefixStore(token, self._kept)
        if launch.rank == 0 and self._kept.check([STOPPED]):  # all ranks have read it
            self._kept.delete_key(STOPPED)
        threading.Thread(target=self._beat, args=(self.store,), daemon=True).start()

    def _connect(self, deadline: float, timeout_seconds: float) -> TCPStore:
        launch = self.launch
        hosts = launch.rank == 0 and not launch.keeps_store
        where = f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
        if not hosts:
            self._reach(where, deadline, timeout_seconds)
        try:
            self._server = serve_store(launch.address, launch.port) if hosts else TCPStore(
                launch.address, launch.port, None, False, timedelta(seconds=STORE_SECONDS), False)
        except (dist.DistError, RuntimeError, ValueError, OSError) as error:
            known = CANNOT_LISTEN.get(getattr(error, "errno", None) or 0)
            raise ConfigError(f"{where}: {known or ' '.join(str(error).split())[:200]}") from None
        return self._server

    def _reach(self, where: str, deadline: float, timeout_seconds: float) -> None:
        """Wait until rank 0's address accepts connections; the library would fill the screen meanwhile."""
        launch, named_by = self.launch, time.monotonic() + NAME_SECONDS
        while True:
            try:
                socket.create_connection((launch.address, launch.port), timeout=2).close()
                return
            except socket.gaierror:
                cause, until = "no host of this name is known", min(named_by, deadline)
            except (OSError, UnicodeError) as error:
                cause, until = f"nobody answers ({getattr(error, 'strerror', None) or error})", deadline
            if time.monotonic() > until:
                raise ConfigError(f"rank {launch.rank} on {launch.host} did not find rank 0 at {where} within "
                                  f"run.timeout_seconds={timeout_seconds:g}: {cause}")
            time.sleep(0.1)

    def _gather_roster(self, mine: str, deadline: float) -> str:
        """Call the ranks together under a new token, as rank 0."""
        launch, kept = self.launch, self._kept
        assert kept is not None
        token = secrets.token_hex(8)
        kept.set("token", json.dumps([token, launch.size]))
        found = {0: [mine, launch.host]}
        while len(found) < launch.size:
            for rank in [rank for rank in range(launch.size) if rank not in found]:
                if kept.check([f"{token}/hello/{rank}"]):
                    found[rank] = json.loads(kept.get(f"{token}/hello/{rank}"))
            if time.monotonic() > deadline:
                missing = [rank for rank in range(launch.size) if rank not in found]
                raise ConfigError(f"{len(found)} of {launch.size} ranks came within run.timeout_seconds="
                                  f"{self._patience:g}; missing: {ranks_text(missing)}; see what they say")
            self._pause()
        self.hosts = [found[rank][1] for rank in range(launch.size)]
        kept.set(f"{token}/roster", json.dumps([found[rank] for rank in range(launch.size)]))
        return token

    def _find_roster(self, mine: str, deadline: float) -> str:
        """Answer rank 0's newest call until its roster names this very process. -> the token"""
        launch, kept = self.launch, self._kept
        assert kept is not None
        said_to, other_size = "", None
        while True:
            token, size = json.loads(kept.get("token")) if kept.check(["token"]) else ("", launch.size)
            other_size = size if size != launch.size else None
            if token and token != said_to:
                if kept.add(f"{token}/rank/{launch.rank}", 1) == 1:
                    kept.set(f"{token}/hello/{launch.rank}", json.dumps([mine, launch.host]))
                said_to = token
            if token and kept.check([f"{token}/roster"]):
                roster = json.loads(kept.get(f"{token}/roster"))
                if launch.rank < len(roster) and roster[launch.rank][0] == mine:
                    self.hosts = [host for _, host in roster]
                    return str(token)
            if time.monotonic() > deadline:
                cause = ("" if other_size is None else
                         f": rank 0 was started with WORLD_SIZE={other_size}, this rank with {launch.size}")
                raise ConfigError(f"rank {launch.rank} on {launch.host} waited run.timeout_seconds={self._patience:g} "
                                  f"for rank 0 to take it in{cause}; see what other ranks say, and whether two "
                                  f"processes were started with RANK={launch.rank}")
            self._pause()

    # ---- settling

    def settle(self, value: Any, choose: Callable[[list[Any]], T]) -> T:
        """Let rank 0 choose from the values of all ranks. value: JSON. -> the choice, the same on every rank

        A ConfigError of `choose` is raised on every rank. Ranks may take as long as they live.
        """
        if self.alone or self.store is None:
            return choose([value])
        self._rounds += 1
        key = f"round{self._rounds}"
        self.store.set(f"{key}/{self.launch.rank}", json.dumps(value))
        if self.launch.rank == 0:
            values = [json.loads(self._wait(f"{key}/{rank}", rank)) for rank in range(self.launch.size)]
            verdict: dict[str, Any]
            try:
                verdict = {"choice": choose(values)}
            except ConfigError as error:
                verdict = {"problem": str(error)}
            self.store.set(key, json.dumps(verdict))
        verdict = json.loads(self._wait(key, 0))
        if "problem" in verdict:
            raise ConfigError(str(verdict["problem"]))
        return cast(T, verdict["choice"])

    def together(self, work: Callable[[], T]) -> T:
        """Call a function on every rank; a ConfigError of one is raised on all, with rank and host. -> its result"""
        problem: str | None = None
        try:
            result = work()
        except ConfigError as error:
            if self.alone:
                raise
            problem = str(error)
        self.settle(problem, self._refuse_first)
        return result

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Call a function on rank 0 for all. -> its result, as JSON; its ConfigError is raised on every rank"""
        return self.settle(None, lambda _: work())

    def _refuse_first(self, problems: Sequence[str | None]) -> None:
        rank = next((rank for rank, problem in enumerate(problems) if problem is not None), None)
        if rank is None:
            return
        shared = all(problem == problems[rank] for problem in problems)
        raise ConfigError(f"{problems[rank]}" if shared or rank == 0 else
                          f"rank {rank} on {self.hosts[rank]}: {problems[rank]}")

    def _wait(self, key: str, rank: int) -> bytes:
        """Wait for a key that a rank is to write, as long as that rank lives."""
        assert self.store is not None
        beats, heard = -1, time.monotonic()
        while not self.store.check([key]):
            if self.store.check(["cause"]):
                raise Silenced(json.loads(self.store.get("cause"))["status"])
            now = self.store.add(f"beat/{rank}", 0)
            if now != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > max(self._patience, 3 * BEAT_SECONDS):
                raise LostRanksError(f"rank {self.launch.rank} on {self.launch.host}: nothing was heard of rank {rank} "
                                     f"on {self.hosts[rank]} for run.timeout_seconds={self._patience:g}")
            self._pause()
        return bytes(self.store.get(key))

    def _beat(self, store: PrefixStore) -> None:
        with suppress(dist.DistError, RuntimeError):
            while not self._beating.wait(BEAT_SECONDS):
                store.add(f"beat/{self.launch.rank}", 1)

    def _pause(self) -> None:
        time.sleep(0.02 * max(1.0, self.launch.size / 64))  # so many ranks ask one store

    # ---- ending

    def keep_word(self, status: int) -> None:
        """Tell ranks that a launcher may start again that the run ended as asked."""
        if self._kept is not None and self.launch.rank == 0 and self.launch.keeps_store:
            self._kept.set(STOPPED, json.dumps({"status": status, "size": self.launch.size}))

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Let the rank that knows why the run ends say so; all others leave with its status and no word."""
        try:
            yield
            if self.store is not None:
                self._say_goodbye()
        except Silenced:
            with suppress(dist.DistError, RuntimeError):
                if self.store is not None:
                    self._say_goodbye()
            raise
        except BaseException as error:
            if self.store is None:
                if isinstance(error, Stopped) and self.launch.restarts > 0:
                    raise Silenced(error.status) from None  # torchrun ends it because another rank has left
                raise
            mine, others = self._claim(error)
            if others is not None:
                raise Silenced(others) from error
            raise mine from error.__cause__
        finally:
            self._beating.set()

    def _claim(self, error: BaseException) -> tuple[BaseException, int | None]:
        """Choose what this rank reports. -> the error; the exit status of another rank's report, if there is one"""
        launch, store = self.launch, self.store
        assert store is not None
        victim = is_of_lost_ranks(error)
        status = next((status for kind, status in EXIT_STATUS if isinstance(error, kind)), 1)
        status = error.status if isinstance(error, Stopped) else status
        # Rank 0, and the store with it, may be gone: then it has said that the run was asked to stop.
        said: int | None = status if launch.rank > 0 and isinstance(error, Stopped) else None
        with suppress(dist.DistError, RuntimeError):
            if launch.rank > 0 or victim:
                deadline = time.monotonic() + (3.0 if victim else HESITATE_SECONDS)
                while not store.check(["cause"]) and time.monotonic() < deadline:
                    time.sleep(0.05)
            if victim:
                said = json.loads(store.get("cause"))["status"] if store.check(["cause"]) else None
            else:
                word = json.dumps({"rank": launch.rank, "status": status})
                first = json.loads(store.compare_set("cause", "", word))
                said = None if first["rank"] == launch.rank else first["status"]
            self._say_goodbye()
        if victim and not isinstance(error, TrainingError):
            error = LostRanksError(f"rank {launch.rank} on {launch.host} lost other ranks: "
                                   f"{' '.join(str(error).split())[:200]}; see what they say")
        elif launch.rank > 0 and isinstance(error, (ConfigError, TrainingError)) and not victim:
            error = type(error)(f"rank {launch.rank} on {launch.host}: {error}")
        elif not isinstance(error, (ConfigError, TrainingError, Stopped, KeyboardInterrupt)):
            error.add_note(f"this happened on rank {launch.rank} on {launch.host}")
        return error, said

    def _say_goodbye(self) -> None:
        """Keep the store, where it lives in rank 0, until the others have read it."""
        assert self.store is not None
        gone = self.store.add("gone", 1)
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.launch.rank == 0 and not self.launch.keeps_store and gone < self.launch.size:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
            gone = self.store.add("gone", 0)


def accuse(address: str, port: int, run_id: str, rank: int) -> bool:
    """Name, as the launcher, the rank that ended without a word, so that the ranks that miss it need not guess.

    Returns whether nobody has said before why the run ends, so that it is the launcher's to say.
    """
    try:
        store = TCPStore(address, port, None, False, timedelta(seconds=FAREWELL_SECONDS), False)
        kept = PrefixStore(f"moescale/{run_id}", store)
        if not kept.check(["token"]):
            return True
        token, _ = json.loads(kept.get("token"))
        word = json.dumps({"rank": rank, "status": 1})
        first = PrefixStore(token, kept).compare_set("cause", "", word)
        return bool(json.loads(first) == json.loads(word))
    except (dist.DistError, RuntimeError, ValueError):  # it is gone with the rank that kept it
        return True


def forget_word(store: TCPStore, run_id: str) -> None:
    """Let ranks begin, as the launcher, though those before them left when asked to: nodes came or went."""
    PrefixStore(f"moescale/{run_id}", store).delete_key(STOPPED)


def ranks_text(ranks: Sequence[int]) -> str:
    """Write ranks as a person reads them: `ranks 1, 4-7`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)
