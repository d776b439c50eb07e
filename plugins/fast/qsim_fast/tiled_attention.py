"""Compute attention a few heads at a time (of a few samples, if they are small): their scores stay in the cache.

Each head is computed by itself, unless a quantizer depends on more than its rows, or an observer is present. Then this
module declines, and all heads are computed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qsim_core.matmuls.attention import explicit_attention
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites
from qsim_fast.causal_attention import QUERIES, SCORES, can_be_cut, causal_attention
from qsim_fast.quantizing import needs_reference


def attend(
    sites: Sites,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    queries: int = QUERIES,
    scores: int = SCORES,
) -> Tensor | None:
    """Compute `explicit_attention` by tiles, with the same numbers; None if all heads have to be computed at once.

    `queries` are the queries of a tile of causal attention, `scores` the scores of any tile, at most.
    """
    frame = sites.stack.frames[-1]
    first = frame.products
    met = [site for i in range(2) if (site := sites.table.get(f"{frame.path}:matmul.{first + i}")) is not None]
    masked = attn_mask is None or attn_mask.dim() == query.dim()
    shapes = {tuple(t.shape[: 2 - enable_gqa]) if t.dim() == 4 else None for t in (query, key, value)}
    matching = len(shapes) == 1 and None not in shapes and key.shape[1] == value.shape[1]
    possible = len(met) == 2 and matching and masked and not dropout_p
    if not possible or not _worthwhile(query) or not _independent_of_order(sites, met):
        return None
    calls = [site.calls + 1 for site in met]
    triangular = is_causal and attn_mask is None and query.shape[-2] == key.shape[-2] > queries
    result = None
    if triangular and _plain_operands(query, key, value) and can_be_cut(met[0], met[1], queries):
        result = causal_attention(sites, met, query, key, value, scale, queries=queries, scores=scores)
        if not bool(result.sum().isfinite()):  # through a scale, NaN may reach values that do not depend on it
            result = None
    if result is None and all(quantizer.by_rows for quantizer in _quantizers(met)):
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        for place, operands in _heads(query, key, value, attn_mask, enable_gqa, scores):
            frame.products = first
            result[place] = explicit_attention(*operands, 0.0, is_causal, scale)
    if result is None:
        return None
    frame.products = first + len(met)
    for site, count in zip(met, calls, strict=True):
        site.calls = count
    return result


def _worthwhile(query: Tensor) -> bool:
    """Tell if there are several heads, on a CPU, and no gradient is recorded."""
    several = query.shape[0] * query.shape[1] > 1 and query.device.type == "cpu"
    return several and not torch.is_grad_enabled() and not needs_reference(query)


def _plain_operands(*operands: Tensor) -> bool:
    """Tell if the operands are plain tensors of one dtype, without a dispatch mode or autocast."""
    unseen = not torch.is_autocast_enabled("cpu") and torch._C._len_torch_dispatch_stack() == 0
    return unseen and len({x.dtype for x in operands}) == 1 and not any(isinstance(x, Parameter) for x in operands)


def _independent_of_order(sites: Sites, met: list[Site]) -> bool:
    """Tell if tiles may be computed one by one: no observer, no training, no random numbers, no simulated device."""
    training = sites.stack.frames[-1].module.training
    if sites.watched or training or not sites.quantizing or any(site.rotations for site in met):
        return False
    if any(site.plan.arithmetic.simulates for site in met):
        return False
    return not any(quantizer.draws for quantizer in _quantizers(met))


def _quantizers(met: list[Site]) -> list[Any]:
    """List the quantizers at two products."""
    found = (site.quantizer(role) for site in met for role in ("input", "input2", "output"))
    return [quantizer for quantizer in found if quantizer is not None]


def _heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool, scores: int
) -> Iterator[tuple[tuple[slice, slice], tuple[Tensor, Tensor, Tensor, Tensor | None]]]:
    """Give a few heads of [B, H, length, width] at a time: their place, and their operands."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    query, key = query.contiguous(), key.contiguous()
    value = value.transpose(-1, -2).contiguous().transpose(-1, -2)  # PV is summed over tokens: they lie last in memory
    heads = max(1, scores // max(1, query.shape[-2] * key.shape[-2]))
    samples = max(1, heads // query.shape[1])
    for sample in range(0, query.shape[0], samples):
        for head in range(0, query.shape[1], heads):
            place = slice(sample, sample + samples), slice(head, head + heads)
            own = None
            if mask is not None:
                own = mask[tuple(at if size > 1 else slice(None) for at, size in zip(place, mask.shape, strict=False))]
            yield place, (query[place], key[place], value[place], own)
