"""Functions of native.cpp, compiled by this machine's C++ compiler at their first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("native.cpp")
INCLUDED = "native_*.h"  # beside it
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC",
         "-shared")
COMPILER = "c++"
COMPILE_SECONDS = 60.0
PART_NUMBERS = 1 << 17  # numbers of the rows for which a thread pays
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int64: "int64"}


def runs(x: Tensor) -> bool:
    """Say whether `call` takes tensors like this one: on a processor, of one of the types, with a compiler there.

    Not where torch compiles what calls it, which it could not look into, and not of a subclass or of what torch.func
    wraps, whose numbers may lie elsewhere.
    """
    plain = (type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
             and not torch._C._functorch.is_functorch_wrapped_tensor(x))
    return plain and x.device.type == "cpu" and x.dtype in TYPES and _library() is not None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Call a function of native.cpp with the addresses of tensors, and with numbers; other threads of Python go on.

    name: without the type. arguments: None is no address, and a real number must be a float, not an int. What the
    tensors must be like stands there; nothing is checked. Raises RuntimeError where torch fails in it.
    """
    function = _function(f"{name}_{TYPES[dtype]}", tuple(isinstance(each, float) for each in arguments))
    status = function(*(_number(each) for each in arguments))
    if status != 0:
        raise RuntimeError(f"torch could not compute a product within {name}")


def call_shares(
    name: str, dtype: torch.dtype, shares: Sequence[Sequence[Tensor | int | None]], *arguments: Tensor | int | None
) -> None:
    """Call a function that computes each share on one of torch's threads. shares: the fields that each reads"""
    table = torch.tensor([[_number(each) for each in share] for share in shares], dtype=torch.int64, device="cpu")
    call(name, dtype, table, len(shares), *arguments)


def multiplies(dtype: torch.dtype, d_model: int, d_ff: int) -> bool:
    """Say whether compiled functions multiply such experts by themselves, which no new number of rows makes compile.

    Numbers of rows must be even. Only where `runs` said so before.
    """
    return bool(_function(f"multiplies_{TYPES[dtype]}", (False, False))(d_model, d_ff))


def parts(rows: int, width: int) -> int:
    """Say on how many threads a pass over so many rows is computed: as many as torch has and as pay. width: of a row"""
    return max(1, min(torch.get_num_threads(), rows, rows * width // PART_NUMBERS))


def _number(argument: Tensor | float | None) -> float:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument or 0


@cache
def _function(name: str, real: tuple[bool, ...]) -> Callable[..., int]:
    """Find a function. real: of each argument, whether it is no integer; an address is one"""
    library = _library()
    assert library is not None, "ask `runs` first"
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *(ctypes.c_double if each else ctypes.c_int64 for each in real))
    return prototype((name, library))


@cache
def _library() -> ctypes.CDLL | None:
    """Load the functions, and compile them before where that was not done. None where it cannot be done."""
    try:
        version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS)
        sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob(INCLUDED)))]
        made_of = (*sources, version.stdout, " ".join(FLAGS).encode(), _processor())
        folder = Path.home() / ".cache/moescale/native"
        target = folder / f"{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:20]}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:  # several ranks may be at it
                made = Path(own) / "native.so"
                subprocess.run([COMPILER, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, check=True,
                               timeout=COMPILE_SECONDS)
                made.replace(target)
        library = ctypes.CDLL(str(target))
        library.use_torch(*_functions_of_torch())
        return library
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError):
        return None  # RuntimeError: a user without a home directory; AttributeError: a torch without these functions


def _functions_of_torch() -> list[ctypes.c_void_p]:
    """Find the functions that native.cpp calls: of torch's stable C interface, and of its OpenMP."""
    torch_itself = ctypes.CDLL(torch._C.__file__)
    return [ctypes.cast(getattr(torch_itself, name), ctypes.c_void_p)
            for name in ("aoti_torch_cpu_addmm_out", "aoti_torch_create_tensor_from_blob",
                         "aoti_torch_delete_tensor_object", "GOMP_parallel")]


def _processor() -> bytes:
    """Describe what this processor can run: machines of different kinds may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()
