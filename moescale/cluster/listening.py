"""Stores and sockets that listen at the address that was asked for, and not at every one of the machine."""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta

from torch.distributed import TCPStore

ANSWER_SECONDS = 30.0  # for one answer of a store
BACKLOG = 4096  # nodes and ranks that connect at the same moment


def serve_store(host: str, port: int) -> TCPStore:
    """Open a store that listens at this address of the machine alone. port: 0 for a free one. Raises OSError."""
    server = listen(host, port)
    port = server.getsockname()[1]
    return TCPStore(host, port, is_master=True, master_listen_fd=server.detach(), wait_for_workers=False,
                    timeout=timedelta(seconds=ANSWER_SECONDS))


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address of this machine. Raises OSError: EADDRNOTAVAIL where it is another's.

    A host's own name that leads to the loopback device here, as some systems set it, leads elsewhere from outside;
    under such a name all addresses of this machine are listened at.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    named = not _is_address(host) and host != "localhost"
    if named and all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        return socket.create_server(("", port), backlog=BACKLOG)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
