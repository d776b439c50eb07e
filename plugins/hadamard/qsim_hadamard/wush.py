"""WUSH: `wush()` maps each block of the inputs of a weight by the matrix that suits both."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from qsim_core import RecipeError, Transform
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing
from qsim_hadamard.maps import Blocks
from qsim_hadamard.matrices import hadamard
from qsim_hadamard.rotatable import Rotatable, Size, survey


class Wush(Transform):
    """Puts A x in place of each block x of the inputs, and A⁻ᵀ w in place of the block w of the weight's rows.

    The function stays. With the second moment of the inputs E[x xᵀ], damped, = Uᵀ U, and W the [N, n] block:

        U Wᵀ = V S Rᵀ                 singular values, descending
        s    = S / √N + eigen_damping · mean(S / √N)
        A    = H diag(√s) Vᵀ U⁻ᵀ      H: a Hadamard matrix over √n

    Then E[A x (A x)ᵀ] = H diag(s) Hᵀ: all elements of a block have the same variance, and the weight's columns have
    about the same. Source: WUSH (arXiv 2512.00956), the closed form for one block.

    Left alone, and reported, are the weights that `hadamard` leaves alone too, and those that no data reached.
    """

    name = "wush"
    size: Size = Field("block", description="of what is mapped together: block (a block of the formats), whole, or n")
    damping: float = Field(
        0.01, ge=0, description="of E[x xᵀ]: so many times the mean of its diagonal is added to the diagonal"
    )
    eigen_damping: float = Field(0.01, ge=0, description="of the singular values: so many times their mean is added")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Map every weight that is quantized or whose input is, with its input, and say which were left alone, and why.

        Raises `DataError` without calibration data, and `RecipeError` after a transform that has put such a weight on
        its grid. So does a size that does not divide its inputs.
        """
        weights = {weight.site.name: weight for weight in survey(self, self.size, model, context).weights.values()}
        moments = second_moments(weights, context) if weights else {}
        for name, weight in weights.items():
            if name not in moments:
                context.report(weight.name, note="left alone: no calibration sample reaches it")
                continue
            with editing(model, weight.name) as parameters:
                rows = weight.layout.rows(parameters[weight.name]).double().reshape(-1, weight.length)
            weight.turn(model, context, self.blocks(moments[name].to(rows), rows, weight))

    def blocks(self, moments: Tensor, rows: Tensor, weight: Rotatable) -> Blocks:
        """The matrices for second moments [B, n, n] and rows [N, B·n], in float64."""
        size = weight.size
        columns = rows.unflatten(-1, (-1, size)).movedim(0, -1)  # [B, n, N], Wᵀ of each block
        matrices, inverses = transform(moments, columns, self.damping, self.eigen_damping)
        if not bool(matrices.isfinite().all() & inverses.isfinite().all()):
            raise RecipeError(f"{self}: the inputs of {weight.name} have no finite second moments")
        text = f"WUSH's matrices of {size}"
        return Blocks(matrices.transpose(-1, -2).contiguous(), inverses, text)


def second_moments(weights: Mapping[str, Rotatable], context: Context) -> dict[str, Tensor]:
    """E[x xᵀ] of each block of the inputs at each site, float64 [B, n, n], over all calibration data in one pass.

    Inputs of all experts of a layer count together. A site that no value reaches is left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(site: Site, call: Call) -> None:
        if site.name not in weights:
            return
        x = call.input.reshape(-1, weights[site.name].length).double()
        if not len(x):
            return
        blocks = x.unflatten(-1, (-1, weights[site.name].size)).movedim(1, 0)
        sums[site.name] = sums.get(site.name, 0.0) + blocks.transpose(-1, -2) @ blocks
        counts[site.name] = counts.get(site.name, 0) + len(x)

    context.observe(watch, context.name)
    for name, count in counts.items():
        if count < (size := weights[name].size):
            context.warn(name, f"saw {count} tokens, fewer than the {size} inputs of its blocks: give more samples")
    return {name: total / counts[name] for name, total in sums.items()}


def transform(moments: Tensor, columns: Tensor, damping: float, eigen_damping: float) -> tuple[Tensor, Tensor]:
    """A and A⁻¹ [B, n, n] for E[x xᵀ] [B, n, n] and Wᵀ [B, n, N], in the dtype of these.

    A block whose inputs are always zero has the identity as its second moment. The sign of each column of V is such
    that its largest element is positive. Raises `RecipeError` for second moments without an inverse.
    """
    size, rows = columns.shape[-2:]
    unit = torch.eye(size, dtype=moments.dtype, device=moments.device)
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damped = torch.where(mean == 0, unit, moments + damping * mean * unit)
    upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
    if bool(failed.any()):
        raise RecipeError(f"wush: the inputs of a block of {size} span fewer directions; damp them, or add samples")
    product = upper @ columns
    values, vectors = torch.linalg.eigh(product @ product.transpose(-1, -2))  # = V S² Vᵀ, ascending
    values, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    vectors = vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
    scales = values / math.sqrt(rows)
    scales = scales + eigen_damping * scales.mean(-1, keepdim=True)
    root = torch.where(scales == 0, 1.0, scales).sqrt()
    turn = hadamard(size).to(moments) / math.sqrt(size)
    inverse_upper = torch.linalg.solve_triangular(upper, unit.expand_as(upper), upper=True)
    matrices = turn @ (root.unsqueeze(-1) * vectors.transpose(-1, -2)) @ inverse_upper.transpose(-1, -2)
    inverses = upper.transpose(-1, -2) @ (vectors / root.unsqueeze(-2)) @ turn.T
    return matrices, inverses
