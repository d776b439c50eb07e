"""Causal attention by blocks of queries: what its mask covers is not computed, as a fused kernel leaves it out too.

Queries, keys and values are quantized first, as a whole; then each block of queries meets the tokens up to its own last
one. The numbers are those of `explicit_attention`, but for the order in which float32 adds up a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsim_core.fast import lowering
from qsim_core.fast.bf16 import BF16, Half
from qsim_core.matmuls.attention import probabilities, within
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, SECOND_LAST, Layout
from qsim_core.quantizers.calibrators import AbsMax, MinMax
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import Fixed, Within, scheme_of
from qsim_core.sites.site import Site
from qsim_core.sites.workspace import Scratch

if TYPE_CHECKING:
    from qsim_core.sites.sites import Sites

ROWS = 128
"""Queries that are computed at a time."""
TOGETHER = 2**20
"""Scores that are computed at a time: 4 MiB of float32."""
HIGHEST = torch.tensor(1.0)
"""The highest value of P: a first query meets its own token only."""


def can_be_cut(scores: Site, values: Site) -> bool:
    """Whether each block of P, and of the two results, can be rounded without the others, zeros at its end left out."""
    attention = any(alias.endswith(":qk") for alias in scores.aliases) and values.is_value_product
    p, q, result = values.quantizer("input"), scores.quantizer("output"), values.quantizer("output")
    rows_apart = getattr(scheme_of(result), "by_rows", True) or _fixed_for_all(result)
    return attention and _elementwise(q) and rows_apart and _keeps_zero(p) and (_elementwise(p) or _cut(p))


def _elementwise(quantizer: Any) -> bool:
    """Whether every value is rounded by itself."""
    return getattr(quantizer, "granularity", "element") == "element" or _fixed_for_all(quantizer)


def _fixed_for_all(quantizer: Any) -> bool:
    return isinstance(quantizer, Fixed) and quantizer.granularity == "tensor"


def _keeps_zero(quantizer: Any) -> bool:
    """Whether zeros beside other values stay zeros."""
    return quantizer is None or not bool(quantizer(torch.tensor([[0.0, 1.0]]))[0, 0])


def _cut(quantizer: Any) -> bool:
    """Whether zeros left out at the end of a row, from a multiple of ROWS on, have no say in other values' scales."""
    if not isinstance(quantizer, Scheme) or not quantizer.symmetric or type(quantizer.range) not in (MinMax, AbsMax):
        return False
    shared, scales_apart = quantizer.granularity, _elementwise(quantizer.scale)
    ends = shared in ("token", "channel", "tensor") or (isinstance(shared, int) and ROWS % shared == 0)
    return ends and ((quantizer.by_rows and scales_apart) or Within.fits(quantizer))


def causal_attention(
    sites: Sites, met: Sequence[Site], query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    """softmax(q kT * scale, of tokens up to the query's own) v: query [B, H, N, D], key [B, H', N, D], value
    [B, H', N, E] -> [B, H, N, E]. `met` are the sites of the two products."""
    scale, length = query.shape[-1] ** -0.5 if scale is None else scale, query.shape[-2]
    result = query.new_empty(*query.shape[:-1], value.shape[-1])
    allowed = torch.ones(ROWS, ROWS, dtype=torch.bool, device=query.device).tril()
    scratch = sites.thread.scratch
    with torch._C.DisableTorchFunction():  # these are the products, no others are to be met
        along_head = sites.recipe.value_axis == "head" and met[1].is_value_product
        scores_of = _Product(sites, met[0], query, key.transpose(-1, -2), SECOND_LAST)
        values_of = _Product(sites, met[1], query, value, LAST if along_head else SECOND_LAST)
        queries, keys, values = scores_of.left(query), scores_of.right(), values_of.right()
        queries, keys, values = (_by_heads(operand, query.shape[1]) for operand in (queries, keys, values))
        found, heads = result.view(-1, *result.shape[2:]), max(1, TOGETHER // (ROWS * length))
        for head in range(0, len(found), heads):
            some = slice(head, head + heads)
            for first in range(0, length, ROWS):
                here, so_far = slice(first, min(first + ROWS, length)), slice(min(first + ROWS, length))
                scores = scores_of.times(_part(queries, some, here), _part(keys, some, so_far), "scores").mul_(scale)
                within(scores[..., here], allowed[: scores.shape[-2], : scores.shape[-2]])  # in its own memory
                met_values = _part(values, some, so_far) if along_head else _part(values, some, slice(None), so_far)
                shares = _shares(scores, query.dtype, scratch)
                with scratch.wanted("P, quantized"):
                    left = values_of.left(shares)
                found[some, here] = values_of.times(left, met_values, "result")
    return result


Operand = Half | Tensor
"""Rows, quantized."""


class _Product:
    """One of attention's products: how it takes its operands, and multiplies them."""

    def __init__(self, sites: Sites, site: Site, query: Tensor, right: Tensor, layout: Layout) -> None:
        self._site, self._layouts, self._rows = site, (LAST, layout), layout.rows(right).contiguous()
        quantizers = [site.quantizer(role) for role in ("input", "input2", "output")]
        if site.is_value_product and not (_elementwise(quantizers[0]) or quantizers[0].by_rows):
            quantizers[0] = Within(quantizers[0], HIGHEST)
        self._quantizers, self._scratch = quantizers, sites.thread.scratch
        call = Call(torch.matmul, (), {}, (query, right), self._layouts, (0, 1))  # P is like the queries in what counts
        form = lowering.choose(sites.recipe.path, call, ("input", "input2"), quantizers)
        self._form = form if isinstance(form, BF16) else None

    def left(self, rows: Tensor) -> Operand:
        """The left operand's rows [..., R, K], quantized."""
        return self._taken(0, rows)

    def right(self) -> Operand:
        """The right operand's, all of them."""
        return self._taken(1, self._rows)

    def _taken(self, place: int, rows: Tensor) -> Operand:
        taken = None if self._form is None else self._form.take(place, rows)
        if taken is not None:
            return taken
        quantizer = self._quantizers[place]
        values: Tensor = rows if quantizer is None else quantizer(rows)
        return values

    def times(self, left: Operand, right: Operand, use: str) -> Tensor:
        """Their product [heads, R, N], quantized, in the memory for this use; and the path that it took."""
        if halves := isinstance(left, Half) and isinstance(right, Half):
            first, second = left.rows, right.rows
        else:
            first, second = (operand.values() if isinstance(operand, Half) else operand for operand in (left, right))
        self._site.path = BF16.path if halves else "float32"
        second, output = self._layouts[1].back(second), self._quantizers[2]
        shape = *first.shape[:-1], second.shape[-1]
        product = torch.bmm(first, second, out=self._scratch.empty(use, shape, first.dtype))
        if halves:  # and rounded already
            return self._scratch.empty(use, shape).copy_(product)
        result: Tensor = product if output is None else output(product)
        return result


def _shares(scores: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """P, in memory that is used again."""
    if scores.dtype == dtype == torch.float32:
        return torch.softmax(scores, -1, out=scratch.empty("P", scores.shape))
    return probabilities(scores, dtype)


def _by_heads(operand: Operand, heads: int) -> Operand:
    """[B, H', rows, columns] as [B * H, rows, columns]: heads of keys and values are there for several of queries."""
    rows = operand.rows if isinstance(operand, Half) else operand
    repeats = heads // rows.shape[1]
    rows = (rows if repeats == 1 else rows.repeat_interleave(repeats, 1)).contiguous().flatten(0, 1)
    return Half(rows) if isinstance(operand, Half) else rows


def _part(operand: Operand, *place: slice) -> Operand:
    return Half(operand.rows[place]) if isinstance(operand, Half) else operand[place]
