"""SVDQuant: `svdquant(rank=32)` takes a low-rank part out of each weight and keeps it in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from qsim_branches.matrices import Matrix, matrices
from qsim_core import Transform
from qsim_core.matmuls.low_rank import LowRank
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Smoothing:
    """x / s along the last axis, in the dtype of x."""

    factors: Tensor
    text: str

    def __call__(self, x: Tensor) -> Tensor:
        return x / self.factors.to(x)

    def __str__(self) -> str:
        return self.text


@dataclass
class Split:
    """A weight in two parts: the rows that are quantized [N, K], and the factors beside them; None: all is rest."""

    rest: Tensor
    beside: LowRank | None


class SVDQuant(Transform):
    """Divides inputs by s, and splits W diag(s) into two factors in 16 bits and a rest, which is quantized.

        s        = max|x|^a / max|w|^b       for each column
        L₁ L₂    = the largest singular values of W diag(s), `rank` of them
        y        = Q(x / s) Q(W diag(s) - L₁ L₂)ᵀ + (x / s) (L₁ L₂)ᵀ

    a and b are those with the least error of y on calibration data: b = 0 or 1 - a, or both 0. Then the factors and
    Q(rest) are found in turn, each from W diag(s) minus the other, until the error of y grows. Source: SVDQuant (arXiv
    2411.05007), as mit-han-lab/deepcompressor searches. The README lists every difference.
    """

    name = "svdquant"
    rank: int = Field(32, ge=1, description="of the two factors")
    dtype: Literal["bf16", "fp16"] = Field("bf16", description="of the two factors and their inputs")
    grid: int = Field(20, ge=0, description="the exponents that are tried are multiples of 1/grid; 0: no smoothing")
    iterations: int = Field(100, ge=1, description="of factors and rest in turn, at most")
    rows: int = Field(1024, ge=1, description="of inputs of each weight, on which errors are measured")

    def beside(self, rows: int, columns: int) -> LowRank | None:
        if self.rank >= min(rows, columns):
            return None
        sizes = (self.rank, columns), (rows, self.rank)
        down, up = (torch.empty(size, dtype=DTYPES[self.dtype], device="meta") for size in sizes)
        return LowRank(down, up)

    def apply(self, model: nn.Module, context: Context) -> None:
        """Split every weight that is quantized. Raises `DataError` without calibration data."""

        def why_not(site: Site, length: int) -> str | None:
            if site.plan.weight is None:
                return "it is not quantized"
            shape = model.get_parameter(site.weight or "").shape
            if self.beside(*shape) is None:
                return f"a rank of {self.rank} is not below its {min(shape)} rows or columns"
            return None

        for matrix in context.run.track(found := matrices(context, self.rows, why_not), len(found), context.name):
            with context.timed() as seconds:
                with editing(model, matrix.name) as parameters:
                    weight = matrix.layout.rows(parameters[matrix.name]).to(matrix.x.dtype)
                trial = Trial(matrix, weight)
                before = trial.error(trial.x, Split(weight, None))
                smoothing, split, after, note = self._search(trial)
                matrix.change(model, lambda rows, split=split: split.rest.to(rows))
                matrix.site.beside = split.beside
                if smoothing is not None:
                    matrix.map_input(Smoothing(smoothing, "SVDQuant's smoothing"))
            measure = "relative error of the outputs"
            context.report(matrix.name, before=before, after=after, measure=measure, seconds=seconds(), note=note)

    def _search(self, trial: Trial) -> tuple[Tensor | None, Split, float, str]:
        """Find the factors of columns (None: none are needed), the parts, their error, and words on them."""
        least, best = float("inf"), (0.0, 0.0)
        for exponents in self._exponents():
            factors = trial.smoothing(*exponents)
            weight = trial.weight * factors
            error = trial.error(trial.x / factors, self._split(weight, torch.zeros_like(weight)))
            if error < least:
                least, best = error, exponents
        factors = trial.smoothing(*best)
        x, weight, quantized = trial.x / factors, trial.weight * factors, torch.zeros_like(trial.weight)
        kept, least, count = None, float("inf"), 0
        for _ in range(self.iterations):
            split = self._split(weight, quantized)
            error = trial.error(x, split)
            if kept is not None and error > least:
                break
            kept, least, count = split, error, count + 1
            quantized = trial.quantized(split.rest)
        assert kept is not None
        note = f"rank {self.rank}; s = max|x|^{best[0]:g} / max|w|^{best[1]:g}; {count} iterations"
        return (None if best == (0, 0) else factors), kept, least, note

    def _exponents(self) -> Iterator[tuple[float, float]]:
        yield 0.0, 0.0
        for step in range(1, self.grid):
            yield step / self.grid, 0.0
            yield step / self.grid, 1 - step / self.grid

    def _split(self, weight: Tensor, quantized: Tensor) -> Split:
        """Split a weight by the matrix of this rank that is nearest to what a quantized rest leaves of it."""
        left, values, right = torch.linalg.svd(weight - quantized, full_matrices=False)
        dtype = DTYPES[self.dtype]
        up, down = left[:, : self.rank] * values[: self.rank], right[: self.rank]
        beside = LowRank(down.to(dtype).contiguous(), up.to(dtype).contiguous())
        return Split(weight - beside.up.to(weight) @ beside.down.to(weight), beside)


class Trial:
    """A weight [N, K], inputs of it [T, K], and what its site makes of both."""

    def __init__(self, matrix: Matrix, weight: Tensor) -> None:
        site, planned = matrix.site, matrix.site.planned("input")
        self.weight, self.x = weight, matrix.x
        self.exact = self.x @ weight.T
        self.of_weight = site.quantizer("weight")
        static = planned is not None and planned.needs_held_scales("input") and "input" not in site.fixed
        self.of_input = None if static else site.quantizer("input")

    def smoothing(self, alpha: float, beta: float) -> Tensor:
        """s for each column; 1 where all inputs, or all weights, are 0."""
        largest, weights = self.x.abs().amax(0), self.weight.abs().amax(0)
        dead = (largest == 0) | (weights == 0)
        return largest.where(~dead, 1.0) ** alpha / weights.where(~dead, 1.0) ** beta

    def quantized(self, rows: Tensor) -> Tensor:
        """The rows as the site quantizes them."""
        rounded: Tensor = self.of_weight.quantize(rows)
        return rounded

    def error(self, x: Tensor, split: Split) -> float:
        """The relative error of the outputs for inputs that are smoothed."""
        inputs = x if self.of_input is None else self.of_input.quantize(x)
        found = F.linear(inputs, self.quantized(split.rest))
        found = found if split.beside is None else found + split.beside(x)
        size = float(self.exact.double().norm())
        return float((found - self.exact).double().norm()) / size if size else 0.0
