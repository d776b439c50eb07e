"""Compare an accelerator with the reference, bit for bit, on tensors with special values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qsim_core.components.component import Preset, options_of
from qsim_core.components.host import Host
from qsim_core.errors import QsimError
from qsim_core.formats.accelerator import Accelerator, accelerated_by, accelerators_by_name, at_once
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Quantizer
from qsim_core.quantizers.scheme import Scheme

DTYPES = (torch.float32, torch.bfloat16)
BITS = {2: torch.int16, 4: torch.int32}
"""The integer type that holds the bits of a float, by its size in bytes."""
Quantize = Callable[[], Tensor]
FINITE = [0, 6, 10, 11, 14, 16, 17]
"""The rows of the special values that one scale can cover."""


def disagreements(host: Host, name: str) -> list[str]:
    """Compare an accelerator in use with the reference; give a message for each quantizer that differs.

    The quantizers are the formats, schemes and presets of a host that need no option. A scheme that needs only an
    element is tried with each format.
    """
    accelerator = accelerators_by_name()[name]
    return [message for quantizer in _quantizers(host) for message in _compared(accelerator, quantizer)]


def special_values() -> Tensor:
    """Make a matrix [18, 200] of ordinary, huge, tiny and equal values, ties, zeros of both signs, Inf and NaN."""
    x = torch.randn(18, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    x[1] *= torch.linspace(-60, 60, 200).exp2()
    x[2], x[3] = 0.0, -0.0
    x[4], x[5] = x[4] * 1e-42, x[5] * 3e38
    x[6] = torch.arange(200) / 4 - 25
    x[7, 3], x[8, 5], x[9, 7] = torch.nan, torch.inf, -torch.inf
    x[10], x[11] = x[10].abs(), -x[11].abs()
    x[12], x[13] = 2.0**-149, torch.finfo(torch.float32).max
    x[14, ::2] = 0.0
    x[15] = torch.tensor([0.5, 1.0, 1.5, 1.75, 2.0]).repeat(40) * 2.0**100
    return x


def _quantizers(host: Host) -> Iterator[Quantizer]:
    """Build the quantizers of a host that need no option, or an element alone."""
    offers = [
        (f"{plugin}.{name}", offered) for name, of in host.components(Quantizer).items() for plugin, offered in of
    ]
    built = {text: quantizer for text, offered in offers if (quantizer := _built(host, text)) is not None}
    yield from built.values()
    formats = [text for text, quantizer in built.items() if isinstance(quantizer, Format)]
    for text, offered in offers:
        if isinstance(offered, Preset) or not issubclass(offered, Scheme):
            continue
        if [option for option, field in options_of(offered).items() if field.is_required()] == ["element"]:
            tried = (_built(host, f"{text}({element})") for element in formats)
            yield from (quantizer for quantizer in tried if quantizer is not None)


def _built(host: Host, text: str) -> Quantizer | None:
    """Build a quantizer; None if its options are missing or do not fit."""
    try:
        quantizer: Quantizer = host.parse(text, Quantizer)
    except QsimError:
        return None
    return quantizer if isinstance(quantizer, Format | Scheme) else None


def _compared(accelerator: Accelerator, quantizer: Quantizer) -> Iterator[str]:
    """Quantize the special values in each dtype by the accelerator and by the reference; a message if they differ."""
    everything = special_values()
    for dtype in DTYPES:
        # the rows with NaN and Inf, and the finite ones by themselves: one scale may be that of the tensor
        for rows in (everything, everything[FINITE]):
            x = rows.to(dtype)
            for name, quantize in _ways(quantizer, x).items():
                message = _difference(accelerator, quantize, x)
                if message is not None:
                    yield f"{quantizer}{name}, of {str(dtype).removeprefix('torch.')}: {message}"
                    return


def _ways(quantizer: Any, x: Tensor) -> dict[str, Quantize]:
    """Give the ways in which a quantizer is used: by itself, and a scheme for scales and under scales that are held."""
    ways: dict[str, Quantize] = {"": lambda: quantizer.quantize(x)}
    if isinstance(quantizer, Scheme) and not isinstance(quantizer.granularity, tuple):
        with accelerated_by():
            scale, zero = quantizer.scales(x)
        shape = (1, 1) if quantizer.granularity == "tensor" else (*scale.shape, 1)
        held = scale.view(shape), None if zero is None else zero.view(shape)
        ways[" under held scales"] = lambda: quantizer.quantize_at(x, *held)
        ways[": scales"] = lambda: torch.cat([part.flatten() for part in quantizer.scales(x) if part is not None])
    return ways


def _difference(accelerator: Accelerator, quantize: Quantize, x: Tensor) -> str | None:
    """Tell in words how an accelerator's result differs from the reference's; None if it does not."""
    with accelerated_by():
        wanted = quantize()
    try:
        with accelerated_by(accelerator), at_once(accelerator):
            found = quantize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{tuple(found.shape)} {found.dtype}, and the reference gives {tuple(wanted.shape)} {wanted.dtype}"
    kind = BITS[wanted.element_size()]
    differs = (found.view(kind) != wanted.view(kind)) & ~(found.isnan() & wanted.isnan())
    if not bool(differs.any()):
        return None
    one, other = (float(tensor[differs][0]) for tensor in (found, wanted))
    before = f" for {float(x[differs][0])!r}" if x.shape == found.shape else ""
    return (
        f"{int(differs.sum())} of {found.numel()} values differ, such as {one!r}{before} in place "
        f"of {other!r}; an accelerator gives the same bits, or declines"
    )
