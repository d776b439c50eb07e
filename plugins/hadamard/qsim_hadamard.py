"""Hadamard rotations: `hadamard()` spreads outliers over all channels before anything is rounded."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import Field
from qsim_structure import NormGroup, Structure
from qsim_structure.for_transforms import scale_group, structure_of
from torch import Tensor, nn

from qsim_core import RecipeError, Transform, hookimpl
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing

LARGEST = 64
"""Factors of a rotation are at most so large, or one of Paley's: cheaper than one product with the whole of it."""


@dataclass(frozen=True)
class Rotation:
    """x D H along the last axis, of `size`: random signs D from `seed` (none: all +1), then a Hadamard matrix over √n.

    H is a Kronecker product of small Hadamard matrices: Sylvester's, and at most one of Paley's. It is applied factor
    by factor, in the dtype of `x`. Raises `ValueError` for a size that is not such a product.
    """

    size: int
    seed: int | None = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.seed is not None:
            x = x * signs(self.size, self.seed).to(x)
        sizes = factors(self.size)
        y = x.unflatten(-1, sizes)
        for axis, size in enumerate(sizes, start=y.dim() - len(sizes)):
            matrix = hadamard(size) / math.sqrt(size)
            y = (y.movedim(axis, -1) @ matrix.to(y)).movedim(-1, axis)
        rotated: Tensor = y.flatten(-len(sizes))
        return rotated

    def __str__(self) -> str:
        return f"a Hadamard matrix of {self.size}"


@functools.lru_cache(maxsize=64)
def signs(size: int, seed: int) -> Tensor:
    """Random signs [size], the same for the same seed everywhere; torch's global generator is left alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1).double()


@functools.lru_cache(maxsize=64)
def factors(size: int) -> tuple[int, ...]:
    """Sizes of Hadamard matrices whose Kronecker product has this size, none larger than need be."""
    two = size & -size
    found: list[int] = []
    if size > two:  # an odd factor m: one of Paley's, of m times a power of two
        odd = size // two
        multiple = next((4 * odd << k for k in range(8) if 4 << k <= two and _paley(4 * odd << k)), None)
        if multiple is None:
            raise ValueError(f"no Hadamard matrix of {size} is known here")
        found, two = [multiple], size // multiple
    while two > LARGEST:
        found, two = [*found, LARGEST], two // LARGEST
    return (*found, two) if two > 1 or not found else tuple(found)


@functools.lru_cache(maxsize=64)
def hadamard(size: int) -> Tensor:
    """A Hadamard matrix [size, size] of ±1, float64: H Hᵀ = size · I.

    Sylvester's for powers of two; else Paley's: size - 1 a prime that leaves 3 when divided by 4, or size / 2 - 1 one
    that leaves 1 (R. Paley, On orthogonal matrices, 1933, constructions I and II).
    """
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        return matrix
    kind = _paley(size)
    order = size if kind == 1 else size // 2
    core = torch.zeros(order, order, dtype=torch.float64)
    core[0, 1:], core[1:, 0] = 1.0, -1.0 if kind == 1 else 1.0
    core[1:, 1:] = _jacobsthal(order - 1)
    if kind == 1:
        return core + torch.eye(order, dtype=torch.float64)
    of_edges = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    of_diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, of_edges) + torch.kron(torch.eye(order, dtype=torch.float64), of_diagonal)


def _paley(size: int) -> int | None:
    """The number of Paley's construction that makes a matrix of this size, with a prime; None: neither does."""
    if size % 4 == 0 and _is_prime(size - 1):
        return 1
    return 2 if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """The matrix of column - row modulo the prime: 1 for a square, -1 for another number, 0 for zero."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    places = torch.arange(prime)
    return character[(places[None, :] - places[:, None]) % prime]


class Hadamard(Transform):
    """Rotates the input of every quantized matmul, and the other operand with it; the function stays.

    x W = (x D H)(Hᵀ D W): the weights are rotated once, the inputs in each forward. So it works on any model, with any
    norms, residuals and ties. `attention` rotates q and k, after any rotary embedding: q kᵀ = (q D H)(k D H)ᵀ.
    `fold_norms` first moves the norms' weights into the linears that read them, where the structure allows it and one
    of these is rotated. Source: QuaRot (arXiv 2404.00456), sections 3 and 4, with randomized Hadamard matrices as
    there.

    Left alone, and reported, are sizes without a Hadamard matrix and convolutions. So are weights that are tied, used
    in two ways, read by another operator, or already on a grid.
    """

    name = "hadamard"
    seed: int | None = Field(0, ge=0, description="of the random signs; none: no signs")
    attention: bool = Field(True, description="rotate q and k too, along the head")
    fold_norms: bool = Field(True, description="move the norms' weights into the linears that read them first")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Rotate every weight that is quantized or whose input is, and say which were left alone, and why.

        Raises `RecipeError` after a transform that has put such a weight on its grid.
        """
        planned = {site.weight or "" for site in context.sites.table.values() if site.plan.weight or site.plan.input}
        if settled := sorted(context.sites.weights.pinned & planned):
            raise RecipeError(
                f"{self} would change {settled[0]}, which an earlier transform has put on its grid; "
                f"put {self} before that one"
            )
        structure = structure_of(context)
        seen: dict[str, list[Layout | None]] = defaultdict(list)
        heads: dict[str, int] = {}

        def watch(site: Site, call: Call) -> None:
            if call.weight is not None and site.weight is not None and not site.op.startswith("conv"):
                operand, layout = call.operands[call.weight], call.layouts[call.weight]
                seen[site.name].append(layout_of(model.get_parameter(site.weight), operand, layout))
            heads[site.name] = call.layouts[0].rows(call.operands[0]).shape[-1]

        context.look(watch)
        rotated: dict[str, Site] = {}
        for site in context.sites.table.values():
            if site.weight is not None and (site.plan.weight or site.plan.input):
                reason = _reason(site, seen[site.name], model.get_parameter(site.weight), context, structure)
                if reason is None:
                    rotated[site.weight] = site
                else:
                    context.report(site.weight, note=f"left alone: {reason}")
            elif self.attention and site.plan.input and any(alias.endswith(":qk") for alias in site.aliases):
                if reason := _unknown(heads[site.name]):
                    context.report(site.name, note=f"left alone: {reason}")
                elif not site.rotations:
                    site.rotations = dict.fromkeys(("input", "input2"), rotation(heads[site.name], self.seed))
        if self.fold_norms:
            _fold_norms(model, [g for g in structure.groups if not rotated.keys().isdisjoint(g.weights)], context)
        for name, site in rotated.items():
            self._rotate(name, site, seen[site.name][0], model, context)

    def _rotate(self, name: str, site: Site, layout: Layout | None, model: nn.Module, context: Context) -> None:
        assert layout is not None
        with context.timed() as seconds, editing(model, name) as parameters:
            parameter = parameters[name]
            rows = layout.rows(parameter)
            site.rotations["input"] = turn = rotation(rows.shape[-1], self.seed)
            before = _peak(rows)
            parameter.copy_(layout.back(turn(rows.double())))
            measure = "largest weight over the root mean square"
            context.report(name, before=before, after=_peak(rows), measure=measure, seconds=seconds())


rotation = functools.lru_cache(maxsize=256)(Rotation)
"""One object for each size, so that q, k and v share the rotated input."""


def _fold_norms(model: nn.Module, groups: Iterable[NormGroup], context: Context) -> None:
    for group in groups:
        with editing(model, f"{group.norm}.weight") as parameters:
            factors = parameters[f"{group.norm}.weight"].double() + group.offset
        if bool((factors.abs() > 1e-6 * factors.abs().max()).all()):
            scale_group(model, group, factors)
        else:
            context.report(group.norm, note="its weight stays: it switches channels off")


def _reason(
    site: Site, seen: list[Layout | None], parameter: Tensor, context: Context, structure: Structure
) -> str | None:
    """The reason why a weight cannot be rotated along its reduction axis; None: it can."""
    weights = context.sites.weights
    if site.op.startswith("conv"):
        return "a convolution"
    if site.weight in weights.tied or len(weights.uses[site.weight or ""]) > 1:
        return "it is tied, or used in two ways"
    if readers := structure.readers.get(site.weight or ""):
        return f"it is also read by {', '.join(readers)}"
    if site.rotations:
        return "its input is rotated already"
    if not seen or seen[0] is None or any(layout is None or layout.name != seen[0].name for layout in seen):
        return "it is used in parts"
    return _unknown(seen[0].rows(parameter).shape[-1])


def _unknown(size: int) -> str | None:
    """The reason why there is no rotation of a size; None: there is one."""
    try:
        factors(size)
    except ValueError as error:
        return str(error)
    return None


def _peak(rows: Tensor) -> float:
    return float(rows.abs().max() / rows.double().square().mean().sqrt()) if rows.numel() else 0.0


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [Hadamard]
