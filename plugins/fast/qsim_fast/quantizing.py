"""Quantizers in one pass over memory: the bits of the reference, by the native kernels.

Where the kernels know how a scheme's scales come about, each block is measured and rounded while it is in the
processor's registers. Where not (one scale for the tensor, scales of scales) they measure all blocks, the scheme makes
scales of that, and they round.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import Parameter

from qsim_core.formats.format import Format, unscaled_format
from qsim_core.formats.rounding import Steps
from qsim_core.quantizers.calibrators import AbsMax, MinMax
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.sites.workspace import Memory, like
from qsim_fast.identity_cache import remembered
from qsim_fast.kernels.interface import GIVEN, Grid, Kernels, Part, Scaling, buffer
from qsim_fast.kernels.native import library

DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "cuda")
RULES = [None, "divide", "floor", "ceil", "even", "rceil"]
BY_GRID = 3


def cast(format: Format, x: Tensor, out: Tensor | None = None) -> Tensor | None:
    """`format.quantize(x)`, or None where the reference has to do it."""
    if (steps := _steps(format, x)) is None or (order := _memory_order(x)) is None:
        return None
    if (kernels := library(x.numel(), x.device)) is None:
        return None
    y = torch.empty_like(x) if out is None else out
    kernels.round(_matrix(x, order), _matrix(y, order), steps, x.shape[-1])
    return y


def quantize(
    scheme: Scheme,
    x: Tensor,
    static: Scales | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    second: float | Tensor | None = None,
    result: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor | None:
    """`scheme.quantize(x)`, or `quantize_at` with static scales; None where the reference has to do it.

    `dtype`, where it holds every value, saves another pass: the result is then in it, in any memory layout, or in
    `out`, part of the rows of another matrix. `second` is the scale of the scales, where it is known.
    """
    if (steps := _steps(scheme.coded, x)) is None or not plain(scheme):
        return None
    kernels = library(x.numel(), x.device)
    if kernels is None or not _held(scheme, x.shape[-1], kernels):
        return None
    if second is not None and not _found_inside(scheme, x.shape[-1], kernels):
        return None
    if out is not None:
        into(scheme, x.contiguous(), out, steps, kernels, static)
        return out
    order = None if static is not None and len(static.scale) > 1 else _memory_order(x)  # scales have rows in order
    source = x.contiguous() if order is None else x
    usable = result is not None and source is x
    y = result if usable and result is not None else like(memory, source, dtype)
    into(scheme, _matrix(source, order), _matrix(y, order), steps, kernels, static, second=second)
    return y if order is not None or dtype is not None else torch.empty_like(x).copy_(y)


def encode(
    scheme: Scheme,
    x: Tensor,
    static: Scales | None,
    shift: float,
    dtype: torch.dtype = torch.int8,
    memory: Memory | None = None,
) -> tuple[Tensor, Scales] | None:
    """x [A, K] as int8 codes less `shift`, or in units of its scales; and these, with zero points.

    None where the reference has to do it.
    """
    if (steps := _steps(scheme.coded, x)) is None or not plain(scheme):
        return None
    kernels = library(x.numel(), x.device)
    if kernels is None or not _held(scheme, x.shape[-1], kernels) or (dtype != torch.int8 and not kernels.parts):
        return None
    x = x.contiguous()
    codes = like(memory, x, dtype)
    return codes, into(scheme, x, codes, steps, kernels, static, shift, without="scale")


def factored(scheme: Scheme, x: Tensor) -> tuple[Tensor, Tensor]:
    """x quantized without the scale that all scales have, in bfloat16, which must hold that; and this scale, a number.

    The scheme has one `above`. Rows come contiguous.
    """
    steps, matrix = _steps(scheme.coded, x), x.contiguous().view(-1, x.shape[-1])
    kernels = None if steps is None else library(x.numel(), x.device)
    if steps is not None and kernels is not None and kernels.parts and _found_inside(scheme, x.shape[-1], kernels):
        second = scale_of_scales(scheme, _highest(scheme, matrix, kernels))
        y = torch.empty_like(matrix, dtype=torch.bfloat16)
        into(scheme, matrix, y, steps, kernels, None, second=second, without="second")
        return y.view(x.shape), second
    second = scale_of_scales(scheme, matrix.abs().amax())
    return without_second(second, scheme.quantize(matrix)).view(x.shape), second


def without_second(second: Tensor, values: Tensor) -> Tensor:
    """Values divided by the scale of their scales again, in bfloat16: few bits, which rounding to it finds again."""
    return (values / torch.where(second == 0, 1.0, second)).to(torch.bfloat16)


def into(
    scheme: Scheme,
    x: Tensor,
    out: Tensor,
    steps: Steps,
    kernels: Kernels,
    static: Scales | None,
    shift: float = 0.0,
    second: float | Tensor | None = None,
    without: Part = "",
) -> Scales:
    """x [A, K] rounded into `out`, as values or as codes less `shift`; gives the scales."""
    block = scheme.granularity if isinstance(scheme.granularity, int) else x.shape[-1]
    known = _given(scheme, x, block, kernels) if static is None else _fit(static)
    if known is None:
        shape = len(x), -(-x.shape[1] // block)
        own = buffer(*shape, device=x.device)
        known = Scales(own, None if scheme.symmetric else torch.empty_like(own))
        if second is None:
            second = 1.0 if above(scheme) is None else scale_of_scales(scheme, _highest(scheme, x, kernels))
        kernels.round(x, out, steps, block, *known, shift, _scaling(scheme), second, without)
    else:
        kernels.round(x, out, steps, block, *known, shift, without=without)
    return known


def _fit(static: Scales) -> Scales:
    """Scales as the kernels read them: float32, zero points by the same strides."""
    scale = static.scale.float().contiguous()
    return Scales(scale, None if static.zero is None else static.zero.float().expand_as(scale).contiguous())


@remembered
def plain(scheme: Scheme) -> bool:
    """Whether the kernels know what shares a scale, and how its range is found, and no subclass knows better.

    What rounds scales is handed them row by row: it may not look at several rows, nor draw numbers by their places.
    """
    scale = scheme.scale
    apart = scale is None or scale.granularity in ("element", "tensor") or scale.by_rows
    if not as_written(type(scheme)) or (scale is not None and scale.draws) or not apart:
        return False
    return not isinstance(scheme.granularity, tuple) and type(scheme.range) in (MinMax, AbsMax)


def _block(scheme: Scheme, columns: int) -> int:
    """How many columns of a row share a scale, at most."""
    return min(scheme.granularity, columns) if isinstance(scheme.granularity, int) else columns


def _held(scheme: Scheme, columns: int, kernels: Kernels) -> bool:
    """Whether the kernels can hold its blocks: those as long as their row they take in pieces."""
    block = _block(scheme, columns)
    return block == columns or block <= kernels.longest


def _found_inside(scheme: Scheme, columns: int, kernels: Kernels) -> bool:
    """Whether the kernels find the scales of its blocks themselves, and round in the same pass."""
    known = plain(scheme) and scheme.granularity != "tensor" and bool(_scaling(scheme).rule)
    return known and _block(scheme, columns) <= kernels.longest


def _given(scheme: Scheme, x: Tensor, block: int, kernels: Kernels) -> Scales | None:
    """Scales and zero points of x [A, K], [A, B] each or [1, 1] for all of it; None: the kernels find them."""
    if _found_inside(scheme, x.shape[1], kernels):
        return None
    low, high = kernels.extremes(x, block, magnitude=scheme.symmetric and scheme.element.min < 0)
    low = -high if low is None else low
    if scheme.symmetric:
        high = high.clamp(min=0)
    elif isinstance(scheme.range, AbsMax):
        high = torch.maximum(high.abs(), low.abs())
        low = -high
    if scheme.granularity == "tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    exact, zero = scheme.covering(low, high)
    return Scales(scheme.rounded_scale(exact).contiguous(), None if zero is None else zero.squeeze(-1).contiguous())


def _highest(scheme: Scheme, x: Tensor, kernels: Kernels) -> Tensor:
    """The highest magnitude of x [A, K], a number."""
    return kernels.extremes(x, x.shape[1], magnitude=bool(_scaling(scheme).magnitude))[1].amax()


def scale_of_scales(scheme: Scheme, highest: Tensor) -> Tensor:
    """The scale that all scales have of a scheme with one `above`, where the highest magnitude is known; a number."""
    scheme_above = above(scheme)
    assert scheme_above is not None
    exact, _ = scheme.covering(-highest, highest)
    return scheme_above.covering(-exact, exact)[0]


@remembered
def above(scheme: Scheme) -> Scheme | None:
    """The scheme of its scales, if that is one scale for all of them, of the kind that the kernels know."""
    found = scheme.scale
    if not isinstance(found, Scheme) or found.granularity != "tensor" or found.scale is not None or found.static:
        return None
    usual = found.symmetric and found.rule == "divide" and plain(found) and found.element.rounding == "even"
    return found if usual and scheme.symmetric and scheme.element.min < 0 <= -found.element.min else None


@remembered
def _scaling(scheme: Scheme) -> Scaling:
    """How the kernels find the scales of a scheme; rule 0 if they cannot."""
    second = above(scheme)
    bare = second.element if second else unscaled_format(scheme.scale)
    rounding = _rounding(scheme, bare)
    if rounding is None:
        return GIVEN
    element, steps = scheme.coded, bare.steps if bare is not None and rounding == BY_GRID else None
    return Scaling(
        rule=RULES.index(scheme.rule),
        rounding=rounding,
        zero_points=not scheme.symmetric,
        magnitude=scheme.symmetric and scheme.element.min < 0,
        absmax=isinstance(scheme.range, AbsMax),
        reach=element.reach if scheme.symmetric else element.max - element.min,
        largest=element.max,
        top=math.frexp(element.max)[1] - 1,
        tie=1 - 0.25 * (element.beyond - element.max) / 2.0 ** (math.frexp(element.max)[1] - 1),
        limit=math.inf if second or bare is None else bare.max,
        second=1.0,
        grid=Grid() if steps is None else Grid.of(steps),
    )


def _rounding(scheme: Scheme, bare: Format | None) -> int | None:
    """How the kernels round a scheme's scales: not at all, to bfloat16, to a power of two it is already, by a grid."""
    if scheme.scale is None:
        return 0
    if bare is None or bare.rounding != "even":
        return None
    if bare.native is torch.bfloat16 and unscaled_format(scheme.scale):
        return 1
    if bare.powers_of_two:
        return 2 if scheme.rule != "divide" and (bare.min, bare.max) == (2.0**-127, 2.0**127) else None
    return BY_GRID if bare.steps is not None and bare.steps.fits else None


def rule_at(scheme: Scheme, x: Tensor) -> Steps | None:
    """The rule by which `scheme.round_at` rounds such a tensor; None where only the scheme knows."""
    here = x.dtype == torch.float32 and x.device.type == "cpu"
    return _steps(scheme.coded, x) if here and as_written(type(scheme)) else None


def _steps(format: Format, x: Tensor) -> Steps | None:
    """The rule of a format, where the kernels can follow it on such a tensor."""
    if x.dtype not in DTYPES or x.device.type not in DEVICES or x.dim() == 0 or x.numel() == 0 or followed(x):
        return None
    return rule(format)


@remembered
def rule(format: Format) -> Steps | None:
    """The rule of a format, where the kernels can follow it."""
    if format.rounding != "even" or not by_steps(type(format)):
        return None
    steps = format.steps
    return steps if steps is not None and steps.fits else None


@functools.cache
def by_steps(format: type[Format]) -> bool:
    """Whether `steps` speaks for the class: no class below the one that has it rounds in a way of its own."""

    def depth(name: str) -> int:
        return next(i for i, base in enumerate(format.__mro__) if name in vars(base))

    return all(depth("steps") <= depth(name) for name in ("round", "table", "limit", "min", "max", "overflow"))


@functools.cache
def as_written(scheme: type[Scheme]) -> bool:
    """Whether a class of schemes computes as the base class says."""
    own = ("quantize", "quantize_at", "split", "join", "round_at", "scale_map", "encode", "__call__")
    return all(getattr(scheme, name) is getattr(Scheme, name) for name in own)


def followed(x: Tensor) -> bool:
    """Whether somebody follows what is done with the tensor, or it is one without memory of its own."""
    gradient = x.requires_grad and torch.is_grad_enabled()
    wrapped = type(x) not in (Tensor, Parameter) or torch._C._functorch.peek_interpreter_stack() is not None
    return (
        gradient or wrapped or x.is_neg() or torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    )


def _memory_order(x: Tensor) -> list[int] | None:
    """The axes of `x` in the order in which memory holds them, rows one after another; None if it holds no rows."""
    if x.is_contiguous():
        return [*range(x.dim())]
    order = sorted(range(x.dim() - 1), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    return [*order, x.dim() - 1] if x.permute(*order, -1).is_contiguous() else None


def _matrix(x: Tensor, order: list[int] | None) -> Tensor:
    """`x` as rows x columns, a view."""
    return (x if order is None or x.is_contiguous() else x.permute(order)).view(-1, x.shape[-1])
