"""Where the nodes of a job find each other: torch's dynamic rendezvous, over a store that listens at one address alone.

Torch's own listens at every address of the machine, and unpickles whatever lies in it, so that a stranger who reaches
the port can run code as the job. Here the store listens where it was asked to, and with a secret that all nodes share
nothing is unpickled that was not signed with it.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import socket
import time
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousTimeout,
    Token,
    _RendezvousExitOp,
)

from moescale.cluster.agreement import forget_word
from moescale.cluster.listening import ANSWER_SECONDS, serve_store

DIGEST_BYTES = hashlib.sha256().digest_size
TIMES = {"join_timeout": 600, "last_call_timeout": 30, "close_timeout": 30, "heartbeat_timeout": 5}  # as torch has them
KEEPING = {"keep_alive_interval": 5, "keep_alive_max_attempt": 3}
NOT_OURS = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)


class SignedBackend(RendezvousBackend):
    """The state of the rendezvous, which torch pickles, beside a signature by a secret."""

    def __init__(self, inner: RendezvousBackend, secret: str) -> None:
        self._inner, self._key = inner, secret.encode()

    @property
    def name(self) -> str:
        return self._inner.name

    def get_state(self) -> tuple[bytes, Token] | None:
        """Read the state. Raises RendezvousStateError where somebody without the secret wrote it."""
        found = self._inner.get_state()
        return None if found is None else (self._open(found[0]), found[1])

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Replace the state that bears a token. Returns the state that then holds, its token, and if it is the new."""
        found = self._inner.set_state(self._sign(state) + state, token)
        return None if found is None else (self._open(found[0]), found[1], found[2])

    def _sign(self, state: bytes) -> bytes:
        return hmac.digest(self._key, state, "sha256")

    def _open(self, sealed: bytes) -> bytes:
        signature, state = sealed[:DIGEST_BYTES], sealed[DIGEST_BYTES:]
        if not hmac.compare_digest(signature, self._sign(state)):
            raise RendezvousStateError("what lies in the store was not signed with this node's MOESCALE_SECRET: give "
                                       "all nodes the same one, and close the port to strangers")
        return state


class BoundRendezvous(DynamicRendezvousHandler):
    """Torch's rendezvous, whose second store, which ranks meet in, listens at the node's address alone as well.

    A node can leave it for good while the others stay, and see whether others have.
    """

    def __init__(self, *words: Any) -> None:
        """Take what torch's own takes."""
        super().__init__(*words)
        self._nodes = 0  # of this round
        self._retired = self._keeps_store = False

    def keep_store(self) -> None:
        """Note that this node keeps the store in which all meet."""
        self._keeps_store = True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet for the next round, in which rank 0 says again where its store is.

        Torch says it in a node's first round alone, so that one that takes a lost node's place would wait for it.
        """
        self._bootstrap_store_info = None
        found = super().next_rendezvous()
        self._nodes = found.world_size
        return found

    def retire(self) -> None:
        """Tell the others, once, that this node leaves: they go on without it, or end if it keeps the store.

        Raises RendezvousError where the store does not answer.
        """
        if self._retired:
            return
        self._retired = True
        self._stop_heartbeats()
        if self._keeps_store:
            self.set_closed()
        else:
            with self._heartbeat_lock:
                self._op_executor.run(_RendezvousExitOp(), self._get_deadline(self._settings.timeout.close))

    def wait_for_change(self, seconds: float) -> bool:
        """Wait until nodes are known to have come or gone since this round began. Returns whether they have.

        They have not where the rendezvous was closed. Raises RendezvousError where the store does not answer.
        """
        deadline = time.monotonic() + seconds
        while True:
            with self._heartbeat_lock:
                self._state_holder.sync()
                state = self._state_holder.state
            changed = bool(state.wait_list) or len(state.participants) < self._nodes
            if state.closed or changed or time.monotonic() > deadline:
                return changed and not state.closed
            time.sleep(0.1)

    def num_nodes_waiting(self) -> int:
        """Count the nodes that wait for the next round; none for a node that will not be in it."""
        return 0 if self._retired else super().num_nodes_waiting()

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        if isinstance(self._shared_tcp_store_server, TCPStore):
            forget_word(self._shared_tcp_store_server, self.get_run_id())
            return self._shared_tcp_store_server  # what else ranks said in it outlives the round
        try:
            return serve_store(master_addr, master_port)
        except OSError as error:
            raise RendezvousConnectionError(
                f"this node's own address, {master_addr}, cannot be listened at ({error.strerror}): write its address "
                "in --local-addr, or ADDRESS for launch/torchrun.sh") from None


def create_rendezvous(params: RendezvousParameters, secret: str) -> BoundRendezvous:
    """Find or open the job's store and make what nodes meet with. secret: empty for none. Raises RendezvousError."""
    host, _, port = params.endpoint.rpartition(":")
    unknown = [key for key in params.config if key not in {*TIMES, *KEEPING}]
    if unknown:
        raise RendezvousError(f"--rdzv-conf has {unknown[0]}: write {', '.join((*TIMES, *KEEPING))} alone")
    times = {key: _whole(params, key, usual) for key, usual in TIMES.items()}
    store, kept = _find_store(host.strip("[]"), int(port), times["join_timeout"])
    backend: RendezvousBackend = C10dRendezvousBackend(store, params.run_id)
    if secret:
        backend = SignedBackend(backend, secret)
    handler = BoundRendezvous.from_backend(
        params.run_id, store, backend, params.min_nodes, params.max_nodes, params.local_addr,
        RendezvousTimeout(*(timedelta(seconds=each) for each in times.values())),
        **{key: _whole(params, key, usual) for key, usual in KEEPING.items()})
    assert isinstance(handler, BoundRendezvous)
    if kept:
        handler.keep_store()
    return handler


def _whole(params: RendezvousParameters, key: str, usual: int) -> int:
    found = params.get_as_int(key, usual)
    return usual if found is None else found


def _find_store(host: str, port: int, seconds: float) -> tuple[TCPStore, bool]:
    """Open the store if the address is this machine's and free, or else wait until another node has opened it.

    Returns it, and whether it was opened here.
    """
    where, deadline = f"{host}:{port}", time.monotonic() + seconds
    while True:
        try:
            return serve_store(host, port), True
        except OSError as error:
            cause = error.strerror or str(error)
            if error.errno not in NOT_OURS and not isinstance(error, socket.gaierror):
                raise RendezvousConnectionError(f"{where} cannot be listened at: {cause}") from None
        try:
            socket.create_connection((host, port), timeout=2).close()
            return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS),
                            wait_for_workers=False), False
        except (OSError, DistError) as error:
            cause = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > deadline:
            raise RendezvousConnectionError(f"nobody answers at {where} ({cause}) within {seconds:g} s: write the "
                                            "address of one of the nodes, and start a node there too")
        time.sleep(0.3)
