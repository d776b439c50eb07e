"""The kernels of `kernels.cpp` for CPUs: compiled on the user's machine, and called on torch's memory.

The library is kept in the user's cache under the digest of its source, the compiler and the processor. It is built once
Python has spent as much time on quantizing as the compiler takes, and is found in the cache from then on. A library
that is damaged, or that another user could have written, is built again. Without a compiler, or with QSIM_NATIVE=0, the
reference in Python computes the same bits.
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
import threading
from collections.abc import Iterator
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from qsim_core.errors import QsimError
from qsim_core.files import cache, empty, locked, make_cache_folder, read_checked, write_checked
from qsim_core.formats.rounding import Steps
from qsim_core.machine import processor
from qsim_fast.kernels.arguments import CPU, GIVEN, Grid, Scaling, Task, bfloat16_bits, buffer
from qsim_fast.kernels.protocol import Kernels, Part

HERE = Path(__file__).parent
SOURCE = HERE / "kernels.cpp"
HEADERS = tuple(sorted(HERE.glob("*.h")))
FLAGS = ["-O2", "-ftree-vectorize", "-funswitch-loops", "-march=native", "-std=c++17", "-fPIC", "-shared"]
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fwrapv"]
ELEMENTS_TO_BUILD = 2**27
"""The elements that Python quantizes in about the time that the compiler takes, at some 100 million a second."""
GPU_SPEEDUP = 64
"""The speed of a GPU in elements, relative to a CPU."""
GPU_CALL = 2**15
"""The elements that one call on a GPU counts for: starting the reference's operators takes as long as on a CPU."""
ELEMENTS_PER_THREAD = 2**14
"""The elements of one thread, at least."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""The kinds of results of `round_to_grid` in kernels.cpp, by dtype."""
NONZERO_KEPT = 3
"""The kind of results in bfloat16 where a value too small for it becomes its smallest, not zero."""

log = logging.getLogger(__name__)


class CpuKernels:
    """The kernels, called with tensors. Every tensor is contiguous and on the CPU."""

    longest_block = math.inf
    writes_parts = False
    writes_fractions = True

    def __init__(self, raw: ctypes.CDLL) -> None:
        self.raw = raw
        self.raw.extremes.argtypes = [c_void_p, c_int32, *[c_int64] * 3, c_void_p, c_void_p, c_int32]
        self.raw.round_to_grid.argtypes = [c_void_p, c_int32, c_void_p, c_int32, POINTER(Task), POINTER(Grid)]
        self.raw.error_sums.argtypes = [
            *[c_void_p] * 2, c_int32, POINTER(Task), *[c_float] * 2, *[c_void_p] * 2
        ]  # fmt: skip
        self.raw.any_below.argtypes = [c_void_p, c_int64, c_int32, c_int32]
        self.raw.scale_sums.argtypes = [c_void_p, c_int64, c_int64, *[c_void_p] * 7, c_int32]

    def extremes(self, x: Tensor, block: int, magnitude: bool) -> tuple[Tensor | None, Tensor]:
        """`Kernels.extremes`."""
        rows, columns = x.shape
        block = max(1, min(block, columns))
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
        tensor_scale: float | Tensor = 1.0,
        without: Part = "",
        unit: float = 1.0,
    ) -> Tensor:
        """`Kernels.round`; results are never written without a factor."""
        factor = buffer(1, 1).fill_(1.0) if scale is None else scale
        if isinstance(tensor_scale, Tensor) or tensor_scale != 1.0:
            scaling = Scaling.from_buffer_copy(scaling)
            scaling.tensor_scale = float(tensor_scale)
        task = Task(
            *x.shape,
            max(1, min(block, x.shape[1])),
            factor.data_ptr(),
            *(stride if size > 1 else 0 for size, stride in zip(factor.shape, factor.stride(), strict=True)),
            _address(zero),
            unit,
            shift,
            out.stride(0),
            _threads(x),
            scale is not None or steps.overflow is None,
            scaling,
        )
        bfloat16, grid = x.dtype == torch.bfloat16, Grid.of(steps)
        kind = NONZERO_KEPT if out.dtype == torch.bfloat16 and not bfloat16 else KINDS[out.dtype]
        self.raw.round_to_grid(x.data_ptr(), bfloat16, out.data_ptr(), kind, task, grid)
        return out

    def error_sums(
        self, x: Tensor, y: Tensor, block: int, scale: Tensor, zero: Tensor | None, low: float, high: float
    ) -> tuple[Tensor, Tensor]:
        """Give sums [A, 2] in float64 of the squares of x [A, K] and of x - y, and counts [A, 2].

        The first count is of non-zero values that became zero. The second is of values outside of `low` to `high`, in
        units of their scale [A or 1, B or 1], plus the zero point.
        """
        sums = torch.empty(len(x), 2, dtype=torch.float64)
        counts = torch.empty(len(x), 2, dtype=torch.int64)
        strides = (stride if size > 1 else 0 for size, stride in zip(scale.shape, scale.stride(), strict=True))
        block = max(1, min(block, x.shape[1]))
        task = Task(
            *x.shape, block, scale.data_ptr(), *strides, _address(zero), 1.0, 0.0, x.stride(0), _threads(x), 0, GIVEN
        )
        self.raw.error_sums(
            x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, task, low, high, sums.data_ptr(), counts.data_ptr()
        )
        return sums, counts

    def any_below(self, x: Tensor, bound: float) -> bool:
        """`Kernels.any_below`."""
        return bool(self.raw.any_below(x.data_ptr(), x.numel(), bfloat16_bits(bound), torch.get_num_threads()))

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
    """Choose the number of threads for a tensor: each has 64 KiB of float32 or more."""
    return max(1, min(torch.get_num_threads(), x.numel() // ELEMENTS_PER_THREAD))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Work:
    """The work that Python has done in place of the kernels, and the kernels that are in use."""

    def __init__(self) -> None:
        self.elements = 0
        self.wanted: bool | Kernels = os.environ.get("QSIM_NATIVE") != "0"
        """True: the kernels of each device; False: none; or the kernels that compute everything."""
        self.library: CpuKernels | None = None


_work = _Work()


def kernels_for(elements: int, device: torch.device = CPU) -> Kernels | None:
    """Give the kernels for work on so many elements on a device; None: Python has to do it.

    The elements are counted, so that the kernels are built when they are worth it.
    """
    if switched_off() or forced() is not None:
        return forced()
    if device.type == "cuda":
        from qsim_fast.kernels import gpu

        _work.elements += elements // GPU_SPEEDUP + GPU_CALL
        return gpu.kernels_on(device) if _work.elements >= ELEMENTS_TO_BUILD else None
    if _work.library is None:
        _work.elements += elements
        _work.library = load(build=_work.elements >= ELEMENTS_TO_BUILD)
    return _work.library


def switched_off() -> bool:
    """Tell if Python has to do everything."""
    return _work.wanted is False


def available() -> bool:
    """Tell if the kernels for a CPU are in use, or will be once there is enough work for them."""
    kernels = forced()
    return not switched_off() and (kernels is None or isinstance(kernels, CpuKernels)) and _compiler() is not None


def forced() -> Kernels | None:
    """Give the kernels that compute everything, if `only` was given some."""
    return None if isinstance(_work.wanted, bool) else _work.wanted


@contextlib.contextmanager
def only(wanted: bool | Kernels) -> Iterator[None]:
    """Use the kernels for everything, built at once (True, or the given ones), or Python for everything (False)."""
    before = _work.wanted, _work.elements
    _work.wanted, _work.elements = wanted, ELEMENTS_TO_BUILD
    try:
        yield
    finally:
        _work.wanted, _work.elements = before


def load(build: bool) -> CpuKernels | None:
    """Load the kernels from the cache, or build them if `build`. None: without a compiler, or not built yet."""
    library = _built(SOURCE, build)
    return None if library is None else CpuKernels(library)


def compiled(source: Path, elements: int) -> ctypes.CDLL | None:
    """Compile a source once Python has done as much work as the compiler takes; `elements` is the work of this call.

    None: it is too early, a compiler is missing, or Python has to do everything.
    """
    kernels = forced()
    if switched_off() or (kernels is not None and not isinstance(kernels, CpuKernels)):
        return None
    _work.elements += elements
    return _built(source, build=_work.elements >= ELEMENTS_TO_BUILD)


_lock = threading.Lock()


def _built(source: Path, build: bool) -> ctypes.CDLL | None:
    with _lock:
        return _build(source, build)


@functools.cache
def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@functools.cache
def _build(source: Path, build: bool) -> ctypes.CDLL | None:
    """Load the compiled source from the user's cache, under a digest of the source, the flags and the machine."""
    compiler = _compiler()
    texts = b"".join(path.read_bytes() for path in (source, *HEADERS))
    digest = hashlib.sha256(texts + repr((FLAGS, EXACT, compiler, processor())).encode()).hexdigest()
    try:
        path = cache() / "kernels" / f"{digest[:16]}.so"
        content = read_checked(path, own=True)
        if content is None:
            if compiler is None or not (build or path.exists()):
                return None  # a library that is there, and not as it was written, was worth compiling before
            make_cache_folder(path.parent.name, "compiled kernels")
            with locked(path):
                content = read_checked(path, own=True)  # another process may have been faster
                if content is None:
                    content = _compile(compiler, source, path.with_suffix(".build"))
                    write_checked(path, content)
        return _loaded(content, path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home directory
        log.info("quantizing in Python: the kernels cannot be built or loaded (%s)", error)
    except QsimError as error:
        log.warning("quantizing in Python: %s", error)
    return None


def _loaded(content: bytes, path: Path) -> ctypes.CDLL:
    """Load a library from memory of this process: no change of the file can end the process while it is in use."""
    if not hasattr(os, "memfd_create"):
        return ctypes.CDLL(str(path))
    opened = os.memfd_create(path.name)  # it stays open: the loader knows libraries by their paths
    with open(opened, "wb", closefd=False) as file:
        file.write(content)
    return ctypes.CDLL(f"/proc/self/fd/{opened}")


def _compile(compiler: str, source: Path, folder: Path) -> bytes:
    with empty(folder):
        made = folder / "kernels.so"
        command = [compiler, *FLAGS, *EXACT, f"-I{HERE}", str(source), "-o", str(made)]
        threaded = subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=120, check=False)
        if threaded.returncode:  # a compiler without OpenMP: one thread
            subprocess.run(command, capture_output=True, timeout=120, check=True)
        return made.read_bytes()
