"""The kernels of `kernels.cpp`, compiled on the user's machine by its own C++ compiler, and called on torch's memory.

The library is kept in the user's cache under the digest of its source and of the processor, so that it is built once.
It is built when the work that it would have saved has taken as long as building it takes: at worst one pays twice.
Without a compiler, or with QSIM_NATIVE=0, the reference in Python computes the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from ctypes import POINTER, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from qsim_core.files import cache, make_cache_folder
from qsim_core.formats.rounding import Steps
from qsim_core.machine import processor
from qsim_fast.kernels.interface import CPU, GIVEN, Grid, Kernels, Part, Scaling, Task, bits, buffer

SOURCE = Path(__file__).parent / "kernels.cpp"
HEADER = Path(__file__).parent / "grid.h"
FLAGS = ["-O2", "-ftree-vectorize", "-funswitch-loops", "-march=native", "-std=c++17", "-fPIC", "-shared"]
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
WORTH = 2**27
"""Elements that Python quantizes, at some 100 million a second and more, in about the time that the compiler takes."""
AT_ONCE, PER_CALL = 64, 2**15
"""A GPU does as much 64 times as fast, but starts the reference's operators no sooner: so many elements for a call."""
APIECE = 2**14
"""Elements of a thread, at least."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
NONE_LOST = 3
"""bfloat16 where no value is lost without a trace: one too small for it becomes its smallest, not zero."""

log = logging.getLogger(__name__)


class Library:
    """The kernels, with tensors for pointers. Every tensor is contiguous and on the CPU."""

    longest = math.inf
    parts = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = ctypes.CDLL(str(path))
        self.raw.extremes.argtypes = [c_void_p, c_int32, *[c_int64] * 3, c_void_p, c_void_p, c_int32]
        self.raw.round_to_grid.argtypes = [c_void_p, c_int32, c_void_p, c_int32, POINTER(Task), POINTER(Grid)]
        self.raw.any_below.argtypes = [c_void_p, c_int64, c_int32, c_int32]
        self.raw.scale_sums.argtypes = [c_void_p, c_int64, c_int64, *[c_void_p] * 7, c_int32]

    def extremes(self, x: Tensor, block: int, magnitude: bool) -> tuple[Tensor | None, Tensor]:
        """`Kernels.extremes`."""
        rows, columns = x.shape
        high = buffer(rows, -(-columns // block))
        low = None if magnitude else torch.empty_like(high)
        bfloat16, threads = x.dtype == torch.bfloat16, _threads(x)
        self.raw.extremes(x.data_ptr(), bfloat16, rows, columns, block, _address(low), high.data_ptr(), threads)
        return low, high

    def round(
        self,
        x: Tensor,
        out: Tensor,
        steps: Steps,
        block: int,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        shift: float = 0.0,
        scaling: Scaling = GIVEN,
        second: float | Tensor = 1.0,
        without: Part = "",
    ) -> Tensor:
        """`Kernels.round`; there are no results without a part."""
        factor = buffer(1, 1).fill_(1.0) if scale is None else scale
        if isinstance(second, Tensor) or second != 1.0:
            scaling = Scaling.from_buffer_copy(scaling)
            scaling.second = float(second)
        task = Task(
            *x.shape,
            max(1, min(block, x.shape[1])),
            factor.data_ptr(),
            *(stride if size > 1 else 0 for size, stride in zip(factor.shape, factor.stride(), strict=True)),
            _address(zero),
            shift,
            out.stride(0),
            _threads(x),
            scale is not None or steps.overflow is None,
            scaling,
        )
        bfloat16, grid = x.dtype == torch.bfloat16, Grid.of(steps)
        kind = NONE_LOST if out.dtype == torch.bfloat16 and not bfloat16 else KINDS[out.dtype]
        self.raw.round_to_grid(x.data_ptr(), bfloat16, out.data_ptr(), kind, task, grid)
        return out

    def any_below(self, x: Tensor, bound: float) -> bool:
        """`Kernels.any_below`."""
        return bool(self.raw.any_below(x.data_ptr(), x.numel(), bits(bound), torch.get_num_threads()))

    def scale_sums(
        self,
        sums: Tensor,
        rows: tuple[Tensor, Tensor | None, Tensor | None],
        columns: tuple[Tensor, Tensor | None, Tensor | None],
        bias: Tensor | None,
    ) -> Tensor:
        """`Kernels.scale_sums`."""
        (row_scale, row_zero, row_sum), (column_scale, column_zero, column_sum) = rows, columns
        given = row_scale, row_zero, column_sum, row_sum, column_zero, column_scale, bias
        self.raw.scale_sums(sums.data_ptr(), *sums.shape, *map(_address, given), torch.get_num_threads())
        return sums.view(torch.float32)


def _threads(x: Tensor) -> int:
    """How many threads are worth waking for a tensor: each has some 64 KiB to do."""
    return max(1, min(torch.get_num_threads(), x.numel() // APIECE))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Waiting:
    """How much Python has done that the kernels could have, and whether they are wanted at all."""

    def __init__(self) -> None:
        self.elements = 0
        self.wanted: bool | Kernels = os.environ.get("QSIM_NATIVE") != "0"
        self.library: Library | None = None


_waiting = _Waiting()


def library(elements: int, device: torch.device = CPU) -> Kernels | None:
    """The kernels, for work on so many elements there; None: Python shall do it."""
    if switched_off() or forced() is not None:
        return forced()
    if device.type == "cuda":
        from qsim_fast.kernels import gpu

        _waiting.elements += elements // AT_ONCE + PER_CALL
        return gpu.found(device) if _waiting.elements >= WORTH else None
    if _waiting.library is None:
        _waiting.elements += elements
        _waiting.library = load(build=_waiting.elements >= WORTH)
    return _waiting.library


def switched_off() -> bool:
    """Whether Python shall do everything."""
    return _waiting.wanted is False


def forced() -> Kernels | None:
    """The kernels that shall do everything, if `only` has been given some."""
    return None if isinstance(_waiting.wanted, bool) else _waiting.wanted


@contextlib.contextmanager
def only(wanted: bool | Kernels) -> Iterator[None]:
    """Inside, kernels for everything, built at once (True, or these ones), or Python for everything (False)."""
    before = _waiting.wanted, _waiting.elements
    _waiting.wanted, _waiting.elements = wanted, WORTH
    try:
        yield
    finally:
        _waiting.wanted, _waiting.elements = before


def load(build: bool) -> Library | None:
    """The kernels out of the cache, or built if `build`. None without a compiler, or where they are not built yet."""
    path = _built(SOURCE, build)
    return None if path is None else _library(path)


@functools.cache
def _library(path: Path) -> Library | None:
    try:
        return Library(path)
    except OSError as error:
        log.info("quantizing in Python: the kernels do not load (%s)", error)
        return None


def compiled(source: Path, elements: int) -> Path | None:
    """Compile a source once Python has done the work of the compiler; `elements` is the work of this call.

    None: there is no compiler, it is too early, or Python shall do everything.
    """
    kernels = forced()
    if switched_off() or (kernels is not None and not isinstance(kernels, Library)):
        return None
    _waiting.elements += elements
    return _built(source, build=_waiting.elements >= WORTH)


_lock = threading.Lock()


def _built(source: Path, build: bool) -> Path | None:
    with _lock:
        return _build(source, build)


@functools.cache
def _build(source: Path, build: bool) -> Path | None:
    """The compiled source in the user's cache, under the digest of all that decides it."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    texts = source.read_bytes() + HEADER.read_bytes()
    digest = hashlib.sha256(texts + repr((FLAGS, EXACT, compiler, processor())).encode()).hexdigest()
    try:
        path = cache() / "kernels" / f"{digest[:16]}.so"
        if not path.exists():
            if not build or compiler is None:
                return None
            with _alone(path):
                if not path.exists():  # another process may have been faster
                    _compile(compiler, source, path)
        return path
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home directory
        log.info("quantizing in Python: no kernels could be built (%s)", error)
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process builds the same."""
    make_cache_folder(path.parent.name, "compiled kernels")
    if fcntl is None:
        yield
        return
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch) / path.name
        command = [compiler, *FLAGS, *EXACT, f"-I{HEADER.parent}", str(source), "-o", str(part)]
        threaded = subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=120, check=False)
        if threaded.returncode:  # a compiler without OpenMP: one thread
            subprocess.run(command, capture_output=True, timeout=120, check=True)
        part.replace(path)
