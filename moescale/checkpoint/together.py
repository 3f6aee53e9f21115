"""Ranks that save or load a checkpoint together: all of them do it, or all of them fail with the same words."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from moescale.config import ConfigError, LostRanksError, is_of_lost_ranks

T = TypeVar("T")


def _pack(value: Any) -> Any:
    """Write what JSON cannot hold, bytes, tuples and dicts with keys of any kind, as lists that begin with a word."""
    if isinstance(value, bytes):
        return ["bytes", b64encode(value).decode()]
    if isinstance(value, dict):
        return ["dict", *([_pack(key), _pack(part)] for key, part in value.items())]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(_pack, value)]
    return value


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, list):
        return packed
    word, *parts = packed
    if word == "bytes":
        return b64decode(parts[0])
    if word == "dict":
        return {_unpack(key): _unpack(part) for key, part in parts}
    return tuple(map(_unpack, parts)) if word == "tuple" else list(map(_unpack, parts))


class Failed(Exception):
    """Some rank could not do its part; the same text on every rank."""


class Ranks:
    """The ranks that save or load together; this one alone where there is no group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank gives, in the order of ranks. value: numbers, texts, bytes and containers of them

        They travel as JSON, since torch's own way would unpickle what comes.
        """
        if self.alone:
            return [value]
        device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        mine = torch.frombuffer(bytearray(json.dumps(_pack(value)).encode()), dtype=torch.uint8).to(device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=device), group=self.group)
        longest = int(max(sizes))
        texts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=self.group)
        return [_unpack(json.loads(text[:int(size)].cpu().numpy().tobytes()))
                for text, size in zip(texts, sizes, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """Let every rank do its part, and all fail if one does, so that none waits for it.

        Returns what this rank's own gave. Raises Failed, on every rank, with the first problem of any.
        """
        problem: str | None = None
        bug: Exception | None = None
        try:
            result = work()
        except CheckpointException as error:  # raised on all ranks by torch, with each rank's own error in it
            problem = next((describe(failure[0]) for failure in error.failures.values()), str(error))
        except LostRanksError:
            raise
        except Exception as error:
            problem = describe(error)
            bug = None if isinstance(error, (OSError, ConfigError, RuntimeError)) else error
        problems = [text for text in self.gather(problem) if text is not None]
        if bug is not None:
            raise bug
        if problems:
            raise Failed(problems[0])
        return result

    def on_first(self, work: Callable[[], None]) -> None:
        """Let rank 0 do something for all."""
        self.together(work if self.rank == 0 else lambda: None)


@contextmanager
def limited(task: str) -> Iterator[None]:
    """Name what was under way, and the key of its limit, where a rank did not come in time or is gone."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRanksError) or not is_of_lost_ranks(error):
            raise
        cause = " ".join(str(error).split())[:200]
        raise LostRanksError(f"rank {dist.get_rank()}, {task}: {cause}; see what other ranks say first. If the disk "
                             "only needs longer, raise checkpoint.timeout_seconds") from None


def describe(error: BaseException) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() + (f" ({error.filename})" if error.filename else "")
    return " ".join(str(error).split())[:300] or type(error).__name__
