"""The kernels for GPUs, called with tensors: those of `quantizers_triton.py` and `products_triton.py`.

Triton comes with torch's builds for GPUs. It compiles each kernel at its first call, in about a second, and has its own
cache. Without it, or with QSIM_NATIVE=0, the reference in Python computes the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.rounding import Steps
from qsim_fast.kernels.arguments import GIVEN, Grid, Scaling, bfloat16_bits, buffer
from qsim_fast.kernels.native import forced, switched_off
from qsim_fast.kernels.protocol import Part

TRITON = (3, 6)
"""The oldest version of Triton that the kernels were tested with."""
AMPERE = (8, 0)
"""The compute capability of the first GPUs that multiply bfloat16."""
EXACT = {"enable_fp_fusion": False}
"""Options of Triton: no multiplication is fused with an addition."""
PER_PROGRAM = 4096
"""The elements of a program, unless one block is longer."""
LONGEST_BLOCK = 16384
"""The longest block that a program holds in its registers."""
TILE = 64
"""The codes along the reduction axis that are multiplied at a time, at most."""
SHORTEST_TILE = 16
"""The codes along the reduction axis that a matrix unit of the GPU takes, at least."""
MOST_CALLS = 4096
"""The number of compiled calls that are kept; then all are dropped."""

Launch = tuple[Sequence[int], Sequence[Any]]
"""The number of programs along each axis, and the arguments of the kernel after its tensors."""
log = logging.getLogger(__name__)


def kernels_on(device: torch.device) -> GpuKernels | None:
    """Give the kernels for a device; None if they do not run there, or are switched off."""
    if isinstance(wanted := forced(), GpuKernels):
        return wanted
    return None if switched_off() else _working_kernels(device)


@functools.cache
def _working_kernels(device: torch.device) -> GpuKernels | None:
    """Give the kernels, if one of them runs on the device."""
    try:
        from triton import __version__ as version

        if tuple(map(int, version.split(".")[:2])) < TRITON or torch.cuda.get_device_capability(device) < AMPERE:
            return None
        made = GpuKernels()
        made.any_below(torch.zeros(1, dtype=torch.bfloat16, device=device), 1.0)
    except Exception as error:  # Triton needs a C compiler, a folder to write in, a GPU that it knows
        log.info("quantizing in Python on %s: no kernel runs there (%s)", device, error)
        return None
    return made


@functools.cache
def sums_in_float32(device: torch.device) -> bool:
    """Tell if torch gives the float32 sums of a product of bfloat16 tensors on this device."""
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError, AssertionError):  # torch before 2.8, another device
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE


def computes_on_gpu(x: Tensor) -> bool:
    """Tell if products of such a tensor are computed by a GPU, or by Triton's interpreter, which takes any tensor."""
    return x.is_cuda or isinstance(forced(), GpuKernels)


class GpuKernels:
    """The kernels, called with tensors. Every tensor is contiguous and on one GPU."""

    longest_block: float = LONGEST_BLOCK
    writes_parts = True
    writes_fractions = False

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        """The compiled kernels by their calls: Triton's own look-up takes longer than starting one."""

    @functools.cached_property
    def kernels(self) -> Any:
        """The kernels of quantizers. Importing them needs Triton."""
        from qsim_fast.kernels import quantizers_triton

        return quantizers_triton

    @functools.cached_property
    def products(self) -> Any:
        """The kernels of products."""
        from qsim_fast.kernels import products_triton

        return products_triton

    def _launch(
        self,
        kernel: Any,
        pointers: Sequence[Tensor],
        decides: Sequence[Hashable],
        prepare: Callable[[], Launch],
        **options: Any,
    ) -> None:
        """Start a kernel.

        `prepare` gives its programs and other arguments, which are kept for calls with equal `decides`.
        """
        key = (kernel, pointers[0].device.index, *decides, *((p.dtype, p.data_ptr() % 16) for p in pointers))
        run = self._compiled.get(key)
        here = pointers[0].device
        elsewhere = pointers[0].is_cuda and torch.cuda.current_device() != here.index
        with torch.cuda.device(here) if elsewhere else contextlib.nullcontext():
            if run is not None:
                run(*pointers)
                return
            programs, others = prepare()
            programs = (*programs, 1, 1)[:3]
            compiled = kernel[programs](*pointers, *others, **options)
            if pointers[0].is_cuda:
                start = compiled[programs]
                if len(self._compiled) >= MOST_CALLS:
                    self._compiled.clear()
                self._compiled[key] = lambda *pointers: start(*pointers, *others)

    def extremes(self, x: Tensor, block: int, magnitude: bool) -> tuple[Tensor | None, Tensor]:
        """`Kernels.extremes`."""
        rows, columns = x.shape
        length = min(block, PER_PROGRAM) if block >= columns else block  # a row in pieces
        pieces = -(-columns // length)
        high = buffer(rows, pieces, device=x.device)
        low = high if magnitude else torch.empty_like(high)

        def prepare() -> Launch:
            wide, some = _shape(length)
            flags = columns % length == 0, wide == length, wide, some, magnitude
            return (-(-rows * pieces // some),), (*_blocks(rows, columns, length), length, *flags)

        self._launch(self.kernels.extremes, (_raw(x), low, high), (x.shape, length, magnitude), prepare, **EXACT)
        if length != block and pieces > 1:
            low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        return None if magnitude else low, high

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
        """`Kernels.round`; codes are whole units."""
        factor = constant(1.0, x.device) if scale is None else scale
        factor_of_scales = tensor_scale if isinstance(tensor_scale, Tensor) else constant(tensor_scale, x.device)
        pointers = _raw(x), out if x.is_cuda else _raw(out), factor, factor if zero is None else zero, factor_of_scales

        def prepare() -> Launch:
            rows, columns = x.shape
            shared = max(1, min(block, columns))
            length = shared if scaling.rule else _piece(shared, columns)
            (wide, some), grid, own, pieces = _shape(length), Grid.of(steps), scaling.grid, -(-columns // length)
            strides = [stride if size > 1 else 0 for size, stride in zip(factor.shape, factor.stride(), strict=True)]
            one = strides == [0, 0] or (factor.is_contiguous() and factor.shape == (rows, pieces))
            flat = columns % length == 0 and out.is_contiguous() and one
            strides[1] = (1 if any(strides) else 0) if flat else strides[1]
            numbers = (
                *(grid.low, grid.high, grid.overflow, grid.bound, grid.smallest, grid.magic),
                *(scaling.reach, scaling.largest, scaling.top, scaling.tie, scaling.limit),
                *(own.low, own.high, own.smallest, own.magic),
            )
            flags = (
                *(flat, length == shared, wide == length, wide, some, self._kind(x, out, without), x.is_cuda),
                *(bool(grid.fixed), bool(grid.signed_zero), scale is not None or steps.overflow is None),
                *(scaling.rule, scaling.rounding, zero is not None, bool(scaling.magnitude), bool(scaling.absmax)),
                *(bool(own.fixed), bool(own.signed_zero)),
            )
            blocks = _blocks(rows, columns, length)
            return (-(-blocks[0] // some),), (*blocks, length, shared, out.stride(0), *strides, shift, *numbers, *flags)

        decides = (
            x.shape,
            out.stride(0),
            factor.shape,
            factor.stride(),
            _ByIdentity(steps),
            _ByIdentity(scaling),
            block,
            without,
        )
        state = scale is None, zero is None, shift, out.dtype
        self._launch(self.kernels.round_blocks, pointers, (*decides, *state), prepare, **EXACT)
        return out

    def _kind(self, x: Tensor, out: Tensor, without: Part) -> int:
        kernels = self.kernels
        if out.dtype == torch.int8:
            return int(kernels.CODES.value)
        lossy = out.dtype == torch.bfloat16 and x.dtype != torch.bfloat16
        kinds = {
            "scale": kernels.UNITS,
            "tensor_scale": kernels.WITHOUT_TENSOR_SCALE,
            "": kernels.NONZERO_KEPT if lossy else kernels.VALUES,
        }
        return int(kinds[without].value)

    def any_below(self, x: Tensor, bound: float) -> bool:
        """`Kernels.any_below`."""
        found = torch.zeros(1, dtype=torch.int32, device=x.device)
        size = x.numel()
        self._launch(
            self.kernels.any_below,
            (_raw(x), found),
            (size, bound),
            lambda: ((-(-size // PER_PROGRAM),), (size, bfloat16_bits(bound), PER_PROGRAM)),
        )
        return bool(found)

    def scale_sums(
        self,
        sums: Tensor,
        rows: tuple[Tensor, Tensor | None, Tensor | None],
        columns: tuple[Tensor, Tensor | None, Tensor | None],
        bias: Tensor | None,
    ) -> Tensor:
        """`Kernels.scale_sums`."""
        result = sums.view(torch.float32)
        given = *rows, *columns, bias
        there = rows[1] is not None, columns[1] is not None, bias is not None
        self._launch(
            self.products.scale_sums,
            (sums, result, *(rows[0] if tensor is None else tensor for tensor in given)),
            (sums.shape, *there),
            lambda: ((len(sums), -(-sums.shape[1] // 1024)), (*sums.shape, *there, 1024)),
            **EXACT,
        )
        return result

    def multiply(
        self,
        a: tuple[Tensor, Tensor, int],
        b: tuple[Tensor, Tensor, int],
        step: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply codes [S, M, K] by codes [S or 1, N, K] under their scales, in float32: [S, M, N].

        With each come the scales [S, M or 1, blocks or 1] and the length of a block. `step` codes at a time have one
        scale on either side.
        """
        (left, left_scale, left_block), (right, right_scale, right_block) = a, b
        (samples, rows, inner), columns = left.shape, right.shape[1]
        y = buffer(samples, rows, columns, device=left.device)

        def prepare() -> Launch:
            tile, by_rows = tile_of(step, inner), step >= inner
            whole = left.dtype == right.dtype == torch.int8 and tile >= 2 * SHORTEST_TILE
            steps, tiles = (1, -(-inner // tile)) if by_rows else (-(-inner // step), step // tile)
            high, wide = 128 if rows > 64 else 64, 128 if columns > 64 else 64
            batches = (_stride(x, 0) for x in (left, right, left_scale, right_scale))
            within = (_stride(x, axis) for x in (left_scale, right_scale) for axis in (1, 2))
            half = self.products.tl.bfloat16 if left.is_cuda else self.products.tl.float32  # the interpreter's
            known = (1, 0) if by_rows else (0, tiles)  # the kernel need not know the length of a row
            fixed = known if left.is_cuda else (steps, tiles)
            flags = *fixed, tile, left_block, right_block, whole, half, bias is not None, high, wide, 8
            programs = -(-rows // high) * -(-columns // wide) * samples
            return (programs,), (rows, columns, inner, *batches, *within, steps, tiles, *flags)

        pointers = left, right, left_scale, right_scale, left_scale if bias is None else bias, y
        scales = left_scale.shape, left_scale.stride(), right_scale.shape, right_scale.stride()
        decides = left.shape, right.shape, *scales, left_block, right_block, step, bias is None
        self._launch(self.products.multiply_blocks, pointers, decides, prepare, num_warps=8, num_stages=3)
        return y


class _ByIdentity:
    """A part of a key that compares by identity, and keeps its object alive."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


@functools.lru_cache(maxsize=64)
def constant(value: float, device: torch.device) -> Tensor:
    """Give a number as a matrix [1, 1]."""
    return buffer(1, 1, device=device).fill_(value)


def _raw(x: Tensor) -> Tensor:
    """View bfloat16 as its bits."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _stride(x: Tensor, axis: int) -> int:
    return x.stride(axis) if x.shape[axis] > 1 else 0


def tile_of(step: int, inner: int) -> int:
    """Choose how many columns are multiplied at a time: a power of two that divides `step`, if rows have several."""
    return TILE if step >= inner else min(TILE, step & -step)


def _piece(block: int, columns: int) -> int:
    """Choose the length of the pieces in which a block with a given scale is rounded."""
    if block <= PER_PROGRAM:
        return block
    return PER_PROGRAM if block >= columns or block % PER_PROGRAM == 0 else block


def _shape(length: int) -> tuple[int, int]:
    """Give the width of a program's blocks, a power of two, and their number."""
    width = max(2, 1 << (length - 1).bit_length())
    return width, max(1, PER_PROGRAM // width)


def _blocks(rows: int, columns: int, length: int) -> tuple[int, int, int]:
    """Give the number of blocks, of columns, and of blocks in a row."""
    pieces = -(-columns // length)
    return rows * pieces, columns, pieces
