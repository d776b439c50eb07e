"""Quantize with the native kernels: the reference's bits, in one pass over memory.

The reference is `qsim_core.quantizers.scheme`. If the kernels can compute a scheme's scales, they measure and round
each block in one pass. Otherwise they measure all blocks, the scheme computes the scales, and they round in a second
pass: for one scale of the tensor, and for unusual quantizers of scales.

Some schemes, such as NVFP4, divide the scales of blocks by one scale of the whole tensor. It is called `tensor_scale`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.coded_parameter import PARAMETERS
from qsim_core.formats.format import Format, unscaled_format
from qsim_core.formats.rounding import Steps
from qsim_core.quantizers.calibrators import AbsMax, MinMax
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.standard_schemes import Cast
from qsim_core.sites.workspace import Memory, like
from qsim_fast.identity_cache import cached_by_identity
from qsim_fast.kernels.arguments import CPU, GIVEN, Grid, Scaling, buffer
from qsim_fast.kernels.native import CpuKernels, kernels_for
from qsim_fast.kernels.protocol import Kernels, Part

DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "cuda")
RULES = [None, "divide", "floor", "ceil", "even", "rceil"]
"""The rules of `Scaling.rule`, by number; 0: the scales are given."""
BY_GRID = 3
"""The `Scaling.rounding` of a scale that is rounded to the values of a format."""


def cast(format: Format, x: Tensor, out: Tensor | None = None) -> Tensor | None:
    """Compute `format.quantize(x)`; None if the reference has to."""
    if out is not None and _is_native(format) and x.dtype == torch.float32 and not needs_reference(x):
        return out.copy_(x.to(format.native))
    if (steps := _rounding_rule(format, x)) is None or (order := _memory_order(x)) is None:
        return None
    if (kernels := kernels_for(x.numel(), x.device)) is None:
        return None
    y = torch.empty_like(x) if out is None or out is x else out  # kernels read after they have written
    kernels.round(_matrix(x, order), _matrix(y, order), steps, x.shape[-1])
    return y


def quantize(
    scheme: Scheme,
    x: Tensor,
    static: Scales | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tensor_scale: float | Tensor | None = None,
    result: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor | None:
    """Compute `scheme.quantize(x)`, or `quantize_at` with static scales; None if the reference has to.

    A `dtype` that holds every value saves a pass: the result has this dtype, and any memory layout. `out` is a part of
    each row of another matrix, into which the result is written. `result` is memory with the shape, strides and dtype
    of `x`, which may be used. `tensor_scale` is the scale of the scales, if it is known.
    """
    if (steps := _rounding_rule(scheme.coded, x)) is None or not supported(scheme):
        return None
    kernels = kernels_for(x.numel(), x.device)
    if kernels is None or not _blocks_fit(scheme, x.shape[-1], kernels):
        return None
    if tensor_scale is not None and not _in_one_pass(scheme, x.shape[-1], kernels):
        return None
    if out is not None:
        round_into(scheme, x.contiguous(), out, steps, kernels, static)
        return out
    order = None if static is not None and len(static.scale) > 1 else _memory_order(x)  # scales have rows in order
    source = x.contiguous() if order is None else x
    usable = result is not None and source is x and result is not x
    y = result if usable and result is not None else like(memory, source, dtype)
    round_into(scheme, _matrix(source, order), _matrix(y, order), steps, kernels, static, tensor_scale=tensor_scale)
    return y if order is not None or dtype is not None else torch.empty_like(x).copy_(y)


def encode(
    scheme: Scheme,
    x: Tensor,
    static: Scales | None,
    shift: float,
    codes: Tensor,
    unit: float = 1.0,
    tensor_scale: Tensor | None = None,
) -> Scales | None:
    """Turn x [A, K] into `codes` [A, K] minus `shift` (int8), or into units of its scales; give the scales and zeros.

    `unit` is the number of codes of a unit, `tensor_scale` the scale of the scales, if it is known. None: the reference
    has to do it.
    """
    if (steps := _rounding_rule(scheme.coded, x)) is None or not supported(scheme):
        return None
    kernels = kernels_for(x.numel(), x.device)
    if (
        kernels is None
        or not _blocks_fit(scheme, x.shape[-1], kernels)
        or (codes.dtype != torch.int8 and not kernels.writes_parts)
        or (unit != 1 and not kernels.writes_fractions)
        or (tensor_scale is not None and not _in_one_pass(scheme, x.shape[-1], kernels))
    ):
        return None
    return round_into(scheme, x.contiguous(), codes, steps, kernels, static, shift, tensor_scale, "scale", unit)


def scales(scheme: Scheme, x: Tensor) -> Scales | None:
    """Compute `scheme.scales(x)`; None if the reference has to."""
    if _rounding_rule(scheme.coded, x) is None or not supported(scheme):
        return None
    kernels, order = kernels_for(x.numel(), x.device), _memory_order(x)
    if kernels is None or order != [*range(x.dim())] or not _blocks_fit(scheme, x.shape[-1], kernels):
        return None
    return _measured(scheme, _matrix(x, order), _block(scheme, x.shape[-1]), kernels)


def errors(quantizer: Any, x: Tensor, y: Tensor) -> tuple[float, float, int, int] | None:
    """Compute `Accelerator.errors` in one pass over memory; None if the reference has to."""
    scheme: Scheme | None = None
    if isinstance(quantizer, Scheme) and uses_base_methods(type(quantizer)) and type(quantizer).passes is Scheme.passes:
        scheme, format = quantizer, quantizer.coded
    elif type(quantizer) is Cast:
        format = quantizer.element
    else:
        return None
    if type(format).passes is not Format.passes or x.device != CPU or x.dtype != y.dtype:
        return None
    if x.numel() == 0 or x.dim() == 0 or x.dtype not in DTYPES:
        return None
    if needs_reference(x) or needs_reference(y) or not (x.is_contiguous() and y.is_contiguous()):
        return None
    kernels = kernels_for(x.numel(), x.device)
    if not isinstance(kernels, CpuKernels):
        return None
    known, block = Scales(buffer(1, 1).fill_(1.0), None), x.shape[-1]
    if scheme is not None:
        known, block = _in_float32(scheme.scales(x)), _block(scheme, block)
    margin = (format.beyond - format.max) / 2
    bounds = format.min - margin, format.max + margin
    sums, counts = kernels.error_sums(_matrix(x, None), _matrix(y, None), block, *known, *bounds)
    (signal, error), (flushed, outside) = sums.sum(0).tolist(), counts.sum(0).tolist()
    return signal, error, flushed, outside


def without_tensor_scale(scheme: Scheme, x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x, divided by its tensor scale, in bfloat16; give this scale, a 0-d tensor, too.

    The scheme has a `scheme_of_scales`, and bfloat16 holds the divided values.
    """
    steps, matrix = _rounding_rule(scheme.coded, x), x.contiguous().view(-1, x.shape[-1])
    kernels = None if steps is None else kernels_for(x.numel(), x.device)
    if (
        steps is not None
        and kernels is not None
        and kernels.writes_parts
        and _in_one_pass(scheme, x.shape[-1], kernels)
    ):
        tensor_scale = tensor_scale_of(scheme, _highest_magnitude(scheme, matrix, kernels))
        y = torch.empty_like(matrix, dtype=torch.bfloat16)
        round_into(scheme, matrix, y, steps, kernels, None, tensor_scale=tensor_scale, without="tensor_scale")
        return y.view(x.shape), tensor_scale
    tensor_scale = tensor_scale_of(scheme, matrix.abs().amax())
    return divided_by_tensor_scale(tensor_scale, scheme.quantize(matrix)).view(x.shape), tensor_scale


def divided_by_tensor_scale(tensor_scale: Tensor, values: Tensor) -> Tensor:
    """Divide quantized values by their tensor scale, in bfloat16: it holds the quotients, so rounding finds them."""
    return (values / torch.where(tensor_scale == 0, 1.0, tensor_scale)).to(torch.bfloat16)


def round_into(
    scheme: Scheme,
    x: Tensor,
    out: Tensor,
    steps: Steps,
    kernels: Kernels,
    static: Scales | None,
    shift: float = 0.0,
    tensor_scale: float | Tensor | None = None,
    without: Part = "",
    unit: float = 1.0,
) -> Scales:
    """Round x [A, K] into `out`, as values or as codes (`unit` for a unit) minus `shift`; give the scales."""
    block = scheme.granularity if isinstance(scheme.granularity, int) else x.shape[-1]
    known = _scales_first(scheme, x, block, kernels) if static is None else _in_float32(static)
    if known is None:
        shape = len(x), -(-x.shape[1] // block)
        own = buffer(*shape, device=x.device)
        known = Scales(own, None if scheme.symmetric else torch.empty_like(own))
        if tensor_scale is None:
            tensor_scale = (
                1.0
                if scheme_of_scales(scheme) is None
                else tensor_scale_of(scheme, _highest_magnitude(scheme, x, kernels))
            )
        kernels.round(x, out, steps, block, *known, shift, _scaling(scheme), tensor_scale, without, unit)
    else:
        kernels.round(x, out, steps, block, *known, shift, without=without, unit=unit)
    return known


def _in_float32(static: Scales) -> Scales:
    """Convert scales for the kernels: contiguous float32, the zero points in the shape of the scales."""
    scale = static.scale.float().contiguous()
    return Scales(scale, None if static.zero is None else static.zero.float().expand_as(scale).contiguous())


@cached_by_identity
def supported(scheme: Scheme) -> bool:
    """Tell if the kernels can compute the scheme: its blocks lie in rows, and its range is `MinMax` or `AbsMax`.

    The quantizer of the scales is called for the whole matrix: it must not depend on the shape of `x` before that.
    So its scales are not shared over several rows in part, and it draws no random numbers.
    """
    scale = scheme.scale
    apart = scale is None or scale.granularity in ("element", "tensor") or scale.by_rows
    if not uses_base_methods(type(scheme)) or (scale is not None and scale.draws) or not apart:
        return False
    return not isinstance(scheme.granularity, tuple) and type(scheme.range) in (MinMax, AbsMax)


def _block(scheme: Scheme, columns: int) -> int:
    """Count the columns of a row that share a scale, at most."""
    return min(scheme.granularity, columns) if isinstance(scheme.granularity, int) else columns


def _blocks_fit(scheme: Scheme, columns: int, kernels: Kernels) -> bool:
    """Tell if the kernels can take the scheme's blocks; a block as long as its row is taken in pieces."""
    block = _block(scheme, columns)
    return block == columns or block <= kernels.longest_block


def _in_one_pass(scheme: Scheme, columns: int, kernels: Kernels) -> bool:
    """Tell if the kernels compute the scales of the blocks themselves, and round in the same pass."""
    known = supported(scheme) and scheme.granularity != "tensor" and bool(_scaling(scheme).rule)
    return known and _block(scheme, columns) <= kernels.longest_block


def _scales_first(scheme: Scheme, x: Tensor, block: int, kernels: Kernels) -> Scales | None:
    """Compute the scales and zero points of x [A, K], [A, B] or [1, 1]; None: the kernels compute them."""
    return None if _in_one_pass(scheme, x.shape[1], kernels) else _measured(scheme, x, block, kernels)


def _measured(scheme: Scheme, x: Tensor, block: int, kernels: Kernels) -> Scales:
    """Compute the scales and zero points of x [A, K], [A, B] or [1, 1], from the extremes of its blocks."""
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


def _highest_magnitude(scheme: Scheme, x: Tensor, kernels: Kernels) -> Tensor:
    """Find the highest magnitude of x [A, K], a 0-d tensor."""
    return kernels.extremes(x, x.shape[1], magnitude=bool(_scaling(scheme).magnitude))[1].amax()


def tensor_scale_of(scheme: Scheme, highest: Tensor) -> Tensor:
    """Compute the tensor scale of a scheme from the highest magnitude of the tensor; both are 0-d tensors."""
    found = scheme_of_scales(scheme)
    assert found is not None
    exact, _ = scheme.covering(-highest, highest)
    return found.covering(-exact, exact)[0]


def scales_under(scheme: Scheme, x: Tensor, tensor_scale: Tensor) -> Scales:
    """Compute the scales of the blocks of `x`, whose scale of scales is known."""
    found = scheme_of_scales(scheme)
    assert found is not None
    _, exact, *_ = scheme.measured(x)
    return Scales(found.quantize_at(exact, tensor_scale.view(1, 1), None), None)


@cached_by_identity
def scheme_of_scales(scheme: Scheme) -> Scheme | None:
    """Give the scheme that quantizes the scales, if it has one scale for the tensor and the kernels can compute it."""
    found = scheme.scale
    if not isinstance(found, Scheme) or found.granularity != "tensor" or found.scale is not None or found.static:
        return None
    simple = found.symmetric and found.rule == "divide" and supported(found) and found.element.rounding == "even"
    return found if simple and scheme.symmetric and scheme.element.min < 0 <= -found.element.min else None


@cached_by_identity
def _scaling(scheme: Scheme) -> Scaling:
    """Tell the kernels how to compute the scales of a scheme; rule 0 if they cannot."""
    of_scales = scheme_of_scales(scheme)
    bare = of_scales.element if of_scales else unscaled_format(scheme.scale)
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
        limit=math.inf if of_scales or bare is None else bare.max,
        tensor_scale=1.0,
        grid=Grid() if steps is None else Grid.of(steps),
    )


def _rounding(scheme: Scheme, bare: Format | None) -> int | None:
    """Give the `Scaling.rounding` of a scheme's scales; None: the kernels cannot round them.

    0: not at all, 1: to bfloat16, 2: to E8M0, which holds the powers of two already, 3: to the values of a format.
    """
    if scheme.scale is None:
        return 0
    if bare is None or bare.rounding != "even":
        return None
    if bare.native is torch.bfloat16 and unscaled_format(scheme.scale):
        return 1
    if bare.powers_of_two:
        return 2 if scheme.rule != "divide" and (bare.min, bare.max) == (2.0**-127, 2.0**127) else None
    return BY_GRID if bare.steps is not None and bare.steps.fits else None


def rounding_rule_for(scheme: Scheme, x: Tensor) -> Steps | None:
    """Give the rule by which `scheme.round_at` rounds such a tensor; None: only the scheme can round it."""
    here = x.dtype == torch.float32 and x.device.type == "cpu"
    return _rounding_rule(scheme.coded, x) if here and uses_base_methods(type(scheme)) else None


def _rounding_rule(format: Format, x: Tensor) -> Steps | None:
    """Give the rounding rule of a format; None if the kernels cannot follow it on such a tensor."""
    if x.dtype not in DTYPES or x.device.type not in DEVICES or x.dim() == 0 or x.numel() == 0 or needs_reference(x):
        return None
    return rounding_rule(format)


@cached_by_identity
def rounding_rule(format: Format) -> Steps | None:
    """Give the rounding rule of a format; None if the kernels cannot follow it."""
    if format.rounding != "even" or not follows_its_steps(type(format)):
        return None
    steps = format.steps
    return steps if steps is not None and steps.fits else None


@cached_by_identity
def _is_native(format: Format) -> bool:
    """Tell if torch has a dtype that rounds as a format does."""
    return format.native is not None and format.rounding == "even" and follows_its_steps(type(format))


@functools.cache
def follows_its_steps(format: type[Format]) -> bool:
    """Tell if `steps` describes how a class of formats rounds: no subclass of its owner overrides the rounding."""

    def depth(name: str) -> int:
        return next(i for i, base in enumerate(format.__mro__) if name in vars(base))

    return all(depth("steps") <= depth(name) for name in ("round", "table", "limit", "min", "max", "overflow"))


@functools.cache
def uses_base_methods(scheme: type[Scheme]) -> bool:
    """Tell if a class of schemes computes by the methods of `Scheme`."""
    own = ("quantize", "quantize_at", "split", "join", "round_at", "scale_map", "encode", "__call__")
    return all(getattr(scheme, name) is getattr(Scheme, name) for name in own)


def needs_reference(x: Tensor) -> bool:
    """Tell if torch's own operators have to be used: for a gradient, a trace, or a tensor without plain memory."""
    gradient = x.requires_grad and torch.is_grad_enabled()
    wrapped = type(x) not in (Tensor, *PARAMETERS) or torch._C._functorch.peek_interpreter_stack() is not None
    return (
        gradient or wrapped or x.is_neg() or torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    )


def _memory_order(x: Tensor) -> list[int] | None:
    """Sort the axes of `x` by memory order, rows one after another; None if rows are not contiguous."""
    if x.is_contiguous():
        return [*range(x.dim())]
    order = sorted(range(x.dim() - 1), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    return [*order, x.dim() - 1] if x.permute(*order, -1).is_contiguous() else None


def _matrix(x: Tensor, order: list[int] | None) -> Tensor:
    """View `x` as rows x columns."""
    return (x if order is None or x.is_contiguous() else x.permute(order)).view(-1, x.shape[-1])


def scheme_of(quantizer: Any) -> Any:
    """The scheme of a quantizer with static scales; any other quantizer, or None, is returned as it is."""
    return None if quantizer is None else quantizer.plain
