"""Compute causal attention by blocks of queries, without the products that the mask covers, as a fused kernel does.

Queries, keys and values are quantized first, as a whole. Then each block of queries is multiplied by the tokens up to
its last one. The numbers are those of `explicit_attention`, except for the order in which float32 adds up a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qsim_core.matmuls.attention import probabilities, within
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, SECOND_LAST
from qsim_core.quantizers.calibrators import AbsMax, MinMax
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.arithmetic import ExactArithmetic
from qsim_core.sites.operand import operands_of
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites
from qsim_core.sites.workspace import Memory, Workspace
from qsim_fast.bf16 import BFloat16Rows, heads_of
from qsim_fast.integer_blocks import LeftRows, RightRows
from qsim_fast.kernels.block_products import PIECE
from qsim_fast.known_maximum import KnownMaximum
from qsim_fast.partial_execution import PartialExecution

QUERIES = 128
"""The number of queries that are computed at a time."""
SCORES = 2**20
"""The number of scores that are computed at a time: 4 MiB of float32."""
HIGHEST = torch.tensor(1.0)
"""The highest probability: that of the first query, which sees one token."""

Rows = BFloat16Rows | LeftRows | RightRows | Tensor
"""The quantized rows of an operand."""


def can_be_cut(scores: Site, values: Site, queries: int = QUERIES) -> bool:
    """Tell if each block of the probabilities P, and of the two results, can be rounded without the others.

    The zeros at the end of the rows of P are not computed, so they may not change other values.
    """
    attention = any(alias.endswith(":qk") for alias in scores.aliases) and values.is_value_product
    p, q, result = values.quantizer("input"), scores.quantizer("output"), values.quantizer("output")
    rows_apart = result is None or result.by_rows
    return attention and _elementwise(q) and rows_apart and _keeps_zero(p) and (_elementwise(p) or _cut(p, queries))


def _elementwise(quantizer: Any) -> bool:
    """Tell if each value is rounded independently of the others."""
    if quantizer is None or quantizer.granularity == "element":
        return True
    return isinstance(quantizer, StaticScheme) and quantizer.granularity == "tensor"


def _keeps_zero(quantizer: Any) -> bool:
    """Tell if a zero beside other values stays zero."""
    return quantizer is None or not bool(quantizer.quantize(torch.tensor([[0.0, 1.0]]))[0, 0])


def _cut(quantizer: Any, queries: int) -> bool:
    """Tell if zeros at the end of a row, from a multiple of `queries` on, do not change the scales of other values."""
    if not isinstance(quantizer, Scheme) or not quantizer.symmetric or type(quantizer.range) not in (MinMax, AbsMax):
        return False
    shared, scales_apart = quantizer.granularity, _elementwise(quantizer.scale)
    ends = shared in ("token", "channel", "tensor") or (isinstance(shared, int) and queries % shared == 0)
    return ends and ((quantizer.by_rows and scales_apart) or KnownMaximum.supports(quantizer))


def causal_attention(
    sites: Sites,
    met: Sequence[Site],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    *,
    queries: int = QUERIES,
    scores: int = SCORES,
) -> Tensor:
    """Compute softmax(q kT * scale, of tokens up to the query's own) v.

    query [B, H, N, D], key [B, H', N, D], value [B, H', N, E] -> [B, H, N, E]. `met` are the sites of the two products.
    A tile has so many `queries`, and so many `scores` at most.
    """
    scale, length = query.shape[-1] ** -0.5 if scale is None else scale, query.shape[-2]
    result = query.new_empty(*query.shape[:-1], value.shape[-1])
    allowed = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    workspace = sites.stack.workspace
    with torch._C.DisableTorchFunction():  # the sites of these products are known
        exact = sites.exact if queries % PIECE == 0 else ()
        scores_of = _execution(sites, met[0], query, key.transpose(-1, -2), exact)
        values_of = _execution(sites, met[1], query, value, exact)
        query_rows = _by_heads(scores_of.take(0, query), 1)
        keys, values = (
            _by_heads(execution.take(1, execution.operands[1].rows.contiguous()), query.shape[1] // key.shape[1])
            for execution in (scores_of, values_of)
        )
        along_head = values_of.operands[1].layout is LAST
        found, heads = result.view(-1, *result.shape[2:]), max(1, scores // (queries * length))
        for head in range(0, len(found), heads):
            some = slice(head, head + heads)
            for first in range(0, length, queries):
                here, so_far = slice(first, min(first + queries, length)), slice(min(first + queries, length))
                left, right = _part(query_rows, some, here), _part(keys, some, so_far)
                found_scores = scores_of.multiply(left, right, "scores").mul_(scale)
                rows = found_scores.shape[-2]
                within(found_scores[..., here], allowed[:rows, :rows])  # in its own memory
                met_values = _part(values, some, so_far) if along_head else _part(values, some, slice(None), so_far)
                shares = _probabilities(found_scores, query.dtype, workspace)
                left = values_of.take(0, shares, Memory(workspace, "P, quantized"))
                found[some, here] = values_of.multiply(left, met_values, "result")
    return result


def _execution(
    sites: Sites, site: Site, query: Tensor, right: Tensor, exact: Sequence[ExactArithmetic]
) -> PartialExecution:
    """Prepare one of attention's products. To a plan, P looks like the queries."""
    call = Call(torch.matmul, (), {}, (query, right), (LAST, SECOND_LAST), (0, 1))
    left, *rest = operands_of(site, call, (None, None), site.quantizer)
    if site.is_value_product and not (_elementwise(left.quantizer) or left.quantizer.by_rows):
        left = replace(left, quantizer=KnownMaximum(left.quantizer, HIGHEST))
    return PartialExecution(site, call, (left, *rest), site.quantizer("output"), exact, sites.stack.workspace)


def _probabilities(scores: Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """Compute the probabilities P, in memory that is used again."""
    if scores.dtype == dtype == torch.float32:
        return torch.softmax(scores, -1, out=workspace.empty("P", scores.shape))
    return probabilities(scores, dtype)


def _by_heads(operand: Rows, repeats: int) -> Rows:
    """Give each of B * H heads of queries its matrix: heads of queries share heads of keys and values."""
    return heads_of(operand, repeats) if isinstance(operand, Tensor) else operand.by_heads(repeats)


def _part(operand: Rows, *place: slice) -> Rows:
    return operand[place] if isinstance(operand, Tensor) else operand.part(*place)
