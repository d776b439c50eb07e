"""The fused dot product of matrix units: terms are aligned to the largest exponent, cut off, and added up exactly."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from qsim_accumulators.panels import LANES, padded_to, panels
from qsim_accumulators.terms import ZERO_EXPONENT, Terms, exponent_of, float_rule, powers_of_two, same_values
from qsim_core import Arithmetic, Format, RecipeError
from qsim_core.formats.accelerator import compiled
from qsim_core.sites.arithmetic import QuantizedRows

log = logging.getLogger(__name__)
SOURCE = Path(__file__).parent / "fused.cpp"
"""The same sums in C++, for a CPU."""
NATIVE_FRACTION = 28
"""An aligned term is below 2^(fraction + 2), and the native code has 31 bits for it."""
NATIVE_TERMS = 4
"""The work of so many terms of a product is that of one quantized element, for the decision to compile."""
HELD_TERMS = 2**22
"""Terms that the reference holds in memory at a time."""
GROUP = 16
"""Products that are added up exactly before they are scaled."""


class Output(NamedTuple):
    """The register that holds the result of a step."""

    digits: int
    min_exponent: int
    largest: float


OUTPUTS = {
    "float32": Output(23, -126, torch.finfo(torch.float32).max),
    "e8m13": Output(13, -126, torch.finfo(torch.float32).max),
    "float16": Output(10, -14, torch.finfo(torch.float16).max),
}


class Fused(Arithmetic):
    """Adds up products as NVIDIA's matrix units do: `n` products and the running sum in one step.

    A number is s·2^e with 1 ≤ |s| < 2. A subnormal number has its format's lowest exponent and a smaller s. Zero has
    the exponent -126. A product has s = s_a s_b, which is not normalized, and e = e_a + e_b. In a step all terms are
    aligned to the largest exponent, cut off toward zero at `fraction` binary digits, and added up exactly. The sum is
    written back: to float32 and e8m13 cut off toward zero, to float16 rounded to nearest even. Larger sums become ±Inf.
    Inf or NaN among the products gives the Inf or NaN of a plain sum. The reduction axis is walked in order, in steps
    of `n`; a short last step is filled with zeros.

    With `promote`, the sum of so many products goes to a float32 register by an ordinary addition, and the unit starts
    at zero again. So a run of products with Inf and a later run whose sum is -Inf by its size give NaN.

    `scales` says what the unit does with scales of blocks. `after`: it does not know them. Each block is added up by
    itself, and its scaled sum is added in float32. `exponents`: power-of-two scales join the exponents of products.
    `groups`: exact sums of 16 products times both scales are the terms, with the exponents of the scales.

    Source: MMA-Sim (arXiv 2511.10909), section 4, and arXiv 2512.07004, whose models agree with the hardware bit for
    bit; DeepSeek-V3's report (arXiv 2412.19437), section 3.3.2, for promotion.
    """

    name = "fused"
    n: PositiveInt = Field(description="products of a step")
    fraction: int = Field(ge=1, le=40, description="binary digits after the point of an aligned term")
    output: Literal["float32", "e8m13", "float16"] = Field("float32", description="the register of the running sum")
    promote: PositiveInt | None = Field(None, description="products after which the sum goes to a float32 register")
    inputs: tuple[Format, ...] = Field((), description="the formats that the unit takes; (): any float format")
    scales: Literal["after", "exponents", "groups"] = Field("after", description="the use of block scales")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.promote is not None and self.promote % self.n:
            raise ValueError(f"promote={self.promote} is not a multiple of the {self.n} products of a step")
        if self.scales == "groups" and self.n % GROUP:
            raise ValueError(f"a step of {self.n} products has no whole groups of {GROUP}")
        return self

    def check(self, quantizers: Sequence[Any]) -> None:
        """Raise `RecipeError` unless both operands have formats that the unit takes, and the scales that it needs."""
        for quantizer in quantizers:
            number_format = None if quantizer is None else quantizer.rounds_to
            if number_format is None or not self._takes(number_format):
                names = " or ".join(map(str, self.inputs)) or "a float format"
                raise RecipeError(f"it takes {names}, not {number_format or quantizer or 'numbers without a format'}")
            if self.scales != "after":
                self._check_scales(quantizer)

    def _takes(self, number_format: Format) -> bool:
        listed = not self.inputs or any(same_values(number_format, own) for own in self.inputs)
        return listed and float_rule(number_format) is not None

    def _check_scales(self, quantizer: Any) -> None:
        block = GROUP if self.scales == "groups" else 2 * GROUP
        granularity = quantizer.granularity
        if not isinstance(granularity, int) or granularity % block:
            raise RecipeError(f"it takes scales of blocks of {block}, not {quantizer}")
        of_scales = None if quantizer.scale is None else quantizer.scale.rounds_to
        if of_scales is None or not (of_scales.powers_of_two or (self.scales == "groups" and float_rule(of_scales))):
            raise RecipeError(
                f"it takes scales in e8m0{' or e4m3' if self.scales == 'groups' else ''}, not {quantizer}"
            )

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`."""
        if self.scales == "groups":
            product = self._grouped(left, right)
        elif self.scales == "exponents":
            terms = [_with_exponents(rows) for rows in (left, right)]
            product = self._unit(left.units, right.units, *terms)
        else:
            parts = (
                self._unit(x.units, w.units, Terms.of(x.units, left.element), Terms.of(w.units, right.element))
                * x.scale
                * w.scale.transpose(-1, -2)
                for x, w in left.blocks_with(right)
            )
            product = functools.reduce(torch.add, parts)
        return _with_specials(product, left.values, right.values).to(left.values.dtype)

    def _unit(self, x: Tensor, w: Tensor, left: Terms, right: Terms) -> Tensor:
        """Multiply rows x `[..., M, K]` and w `[..., N, K]`, with terms that have 0 in place of ±Inf and NaN."""
        n = self._run_of(x.shape[-1])
        runs = zip(x.split(n, -1), w.split(n, -1), left.split(n), right.split(n), strict=True)
        return functools.reduce(torch.add, itertools.starmap(self._run, runs))

    def _run_of(self, length: int) -> int:
        """The products that the unit adds up before a float32 register takes their sum."""
        return max(length, 1) if self.promote is None else self.promote

    def _run(self, x: Tensor, w: Tensor, left: Terms, right: Terms) -> Tensor:
        """Multiply rows of one run of products.

        In a step with Inf or NaN the finite products do not count. So the sum is infinite by its size only if it was
        before the first of these steps.
        """
        product = self._products(left, right)
        if x.isfinite().all() and w.isfinite().all():
            return product
        plain = x.double() @ w.double().transpose(-1, -2)
        found = torch.where(plain.isfinite(), product, plain.float())
        places = (product.isinf() & plain.isinf()).nonzero(as_tuple=True)
        if len(places[0]):
            *leading, row, column = places
            chosen = [(one, (*leading[len(leading) - one.dim() + 2 :], at)) for one, at in ((x, row), (w, column))]
            special = ~torch.stack([one[at].isfinite() for one, at in chosen]).all(0)
            step = torch.arange(x.shape[-1], device=x.device) // self.n
            before = step < step[special.int().argmax(-1)].unsqueeze(-1)
            rows = [
                Terms(
                    torch.where(before, of.significand[at], 0).unsqueeze(-2),
                    torch.where(before, of.exponent[at], ZERO_EXPONENT).unsqueeze(-2),
                    of.digits,
                )
                for of, (_, at) in zip((left, right), chosen, strict=True)
            ]
            sums = self._products(*rows).flatten()
            found[places] = torch.where(sums.isinf(), sums + plain[places], plain[places]).to(found.dtype)
        return found

    def _products(self, left: Terms, right: Terms) -> Tensor:
        """Multiply finite terms `[..., M, K]` and `[..., N, K]` in float32 `[..., M, N]`."""
        shape = torch.broadcast_shapes(left.significand.shape[:-2], right.significand.shape[:-2])
        product: Tensor
        if right.significand.dim() == 2:
            product = self._matrix(left.map(lambda x: x.flatten(0, -2)), right)
            return product.view(*left.significand.shape[:-1], -1)
        parts = [x.expand(*shape, *x.shape[-2:]).flatten(0, -3) for x in (*left[:2], *right[:2])]
        each = (
            self._matrix(Terms(x, of_x, left.digits), Terms(w, of_w, right.digits))
            for x, of_x, w, of_w in zip(*parts, strict=True)
        )
        product = torch.stack(list(each))
        return product.view(*shape, *product.shape[1:])

    def _matrix(self, left: Terms, right: Terms) -> Tensor:
        """Multiply finite terms `[M, K]` and `[N, K]` in float32 `[M, N]`."""
        found = self._native(left, right)
        if found is not None:
            return found
        height = max(1, HELD_TERMS // (len(right.significand) * min(self.n, right.significand.shape[-1])))
        return torch.cat([self._added_up(_steps(part, right, self.n)) for part in left.split(height, 0)])

    def _added_up(self, steps: Iterable[Terms]) -> Tensor:
        """Add up the terms `[..., M, N, n]` of step after step in float32 `[..., M, N]`."""
        sums: Tensor | None = None
        for terms in steps:
            sums = self._step(terms, sums)
        assert sums is not None
        return sums.float()

    def _step(self, terms: Terms, sums: Tensor | None) -> Tensor:
        """Add the terms of a step to the running sums, float64 `[M, N]` with the values of the register."""
        register = OUTPUTS[self.output]
        highest = terms.exponent.amax(-1)
        if sums is None:
            highest = highest.clamp(min=ZERO_EXPONENT)
            added = terms.aligned(highest.unsqueeze(-1), self.fraction).sum(-1)
        else:
            before = Terms.in_register(sums, register.digits, register.min_exponent)
            highest = torch.maximum(highest, before.exponent)
            added = terms.aligned(highest.unsqueeze(-1), self.fraction).sum(-1) + before.aligned(highest, self.fraction)
        exact = added.double() * powers_of_two(highest - self.fraction)
        unit = powers_of_two(exponent_of(exact).clamp(min=register.min_exponent) - register.digits)
        written = exact / unit
        written = (written.round() if self.output == "float16" else written.trunc()) * unit
        written = torch.where(
            written.abs() > register.largest, torch.copysign(written.new_tensor(torch.inf), written), written
        )
        return written if sums is None else torch.where(sums.isinf(), sums, written)

    def _native(self, left: Terms, right: Terms) -> Tensor | None:
        """Multiply in C++, or on a GPU in Triton; None: without a compiler, or for numbers that do not fit integers."""
        digits, register = left.digits + right.digits, OUTPUTS[self.output]
        (rows, length), columns = left.significand.shape, len(right.significand)
        n = min(self.n, length)
        if self.output == "float16" or self.fraction > NATIVE_FRACTION or digits > NATIVE_FRACTION:
            return None
        if left.significand.is_cuda:
            kernel = kernel_on(left.significand.device)
            return None if kernel is None else kernel(left, right, n, self.fraction, register.digits)
        library = compiled(SOURCE, rows * columns * length // NATIVE_TERMS)
        if library is None:
            return None
        whole = -(-length // n) * n
        fills = (0, ZERO_EXPONENT)
        own = [padded_to(x.int(), whole, fill) for x, fill in zip(left[:2], fills, strict=True)]
        others = [panels(x.int(), whole, fill) for x, fill in zip(right[:2], fills, strict=True)]
        product = torch.empty(rows, len(others[0]) * LANES)
        sizes = (*product.shape, whole, n)
        settings = (self.fraction, digits, register.digits, torch.get_num_threads())
        library.functions.fused_products(
            *(c_void_p(x.data_ptr()) for x in (*own, *others, product)), *map(c_int64, sizes), *map(c_int32, settings)
        )
        return product[:, :columns]

    def _grouped(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows whose terms are exact sums of 16 products times the scales of both blocks."""
        (x, of_x, outer_x), (w, of_w, outer_w) = (_groups(rows) for rows in (left, right))
        digits = sum(_digits_of_units(rows.element) for rows in (left, right))
        sums = (x @ w.transpose(-1, -2)).double().movedim(-3, -1) * 2.0**digits
        scales = of_x.map(lambda t: t.unsqueeze(-2)).times(of_w.map(lambda t: t.unsqueeze(-3)))
        terms = Terms(sums.long() * scales.significand, scales.exponent.expand_as(sums), scales.digits + digits)
        runs = terms.split(self._run_of(left.values.shape[-1] + GROUP - 1) // GROUP)
        product = functools.reduce(torch.add, (self._added_up(run.split(self.n // GROUP)) for run in runs))
        return product * outer_x * outer_w.transpose(-1, -2)


@functools.cache
def kernel_on(device: torch.device) -> Callable[..., Tensor] | None:
    """Give Triton's kernel for a device; None where it does not run. Triton comes with torch's builds for GPUs."""
    try:
        from qsim_accumulators.fused_triton import fused_products

        ones = torch.ones(1, 1, dtype=torch.long, device=device)
        one = Terms(ones, ones, 0)
        fused_products(one, one, n=1, fraction=1, kept=1)
    except Exception as error:  # Triton needs a C compiler, a folder to write in, a GPU that it knows
        log.info("fused dot products in Python on %s: no kernel runs there (%s)", device, error)
        return None
    return fused_products


def _steps(left: Terms, right: Terms, n: int) -> Iterator[Terms]:
    """Give the products of rows `[M, K]` and `[N, K]`, n along K at a time: `[M, N, n]`."""
    for x, w in zip(left.split(n), right.split(n), strict=True):
        yield x.map(lambda t: t.unsqueeze(-2)).times(w)


def _with_exponents(rows: QuantizedRows) -> Terms:
    """Take apart rows, with the exponents of their power-of-two scales in those of the values."""
    scale = torch.where(rows.scale.isfinite(), rows.scale, 1.0).double()
    return Terms.of(rows.units, rows.element).raised(exponent_of(scale))


def _digits_of_units(element: Format) -> int:
    """The binary digits after the point of the smallest value of a float format."""
    digits, min_exponent = float_rule(element) or (0, 0)
    return digits - min_exponent


def _groups(rows: QuantizedRows) -> tuple[Tensor, Terms, Tensor]:
    """Cut rows `[..., R, K]` into groups: units `[..., G, R, 16]`, scales `[..., R, G]`, the scale of the scales."""
    length = rows.values.shape[-1]
    units = F.pad(torch.where(rows.units.isfinite(), rows.units, 0.0), (0, -length % GROUP))
    groups = units.unflatten(-1, (-1, GROUP)).transpose(-2, -3)
    scale = rows.scale.expand(*rows.scale.shape[:-1], length)[..., ::GROUP]
    quantizer = rows.quantizer.scale  # type: ignore[union-attr]
    scales = QuantizedRows(torch.where(scale.isfinite(), scale, 0.0), quantizer, lambda: quantizer.scales(scale))
    return groups, Terms.of(scales.units, scales.element), scales.scale


def _with_specials(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Put the Inf and NaN of a plain sum in place of a finite product: scales that are not finite make them too."""
    if left.isfinite().all() and right.isfinite().all():
        return product
    plain = left.double() @ right.double().transpose(-1, -2)
    settled = plain.isfinite() | (plain.isinf() & ~product.isfinite())
    return torch.where(settled, product, plain.to(product.dtype))
