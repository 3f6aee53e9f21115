"""Where a rank stood when others did not come: an error of the communication library says neither layer nor sizes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist
from torch import Tensor, nn

from moescale.comm.exchange import CommunicationError
from moescale.config import LostRanksError, TrainingError, is_of_lost_ranks


@contextmanager
def name_lost_ranks(where: Callable[[BaseException], str], timeout_seconds: float) -> Iterator[None]:
    """Raise LostRanksError, one line with rank, place and sizes, where ranks do not meet within the time-out.

    where: says where in the model an error arose.
    """
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        known = isinstance(error, CommunicationError)
        if not known and not is_of_lost_ranks(error):
            raise
        said = " ".join(str(error).split())
        cause = said if known else f"rank {dist.get_rank()}, {where(error)}: {said}"
        raise LostRanksError(f"{cause}; see what other ranks say first. If one only needs longer than "
                             f"{timeout_seconds:g} s, raise run.timeout_seconds") from error


def where_in(error: BaseException, model: nn.Module) -> str:
    """Read the innermost module, and the sizes that were to travel, off the frames that the error went through."""
    names = {id(module): name or "the whole model" for name, module in model.named_modules()}
    module, sizes = "outside the model", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for key in ("self", "module"):
            module = names.get(id(frame.f_locals.get(key)), module)
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            sizes = _sizes(frame) or sizes
    return module + sizes


def _sizes(frame: FrameType) -> str:
    tensors = {key: value for key, value in frame.f_locals.items() if isinstance(value, Tensor)}
    return "".join(f", {key} {list(tensor.shape)}" for key, tensor in tensors.items())
