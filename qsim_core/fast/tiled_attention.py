"""Attention written out, a few heads (of a few samples, if they are small) at a time: their scores stay in the cache.

Heads have nothing to do with each other, unless a quantizer sees more than its rows, or somebody wants to see all of
them: then all are computed at once, as without this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qsim_core.fast.causal_attention import ROWS, TOGETHER, can_be_cut, causal_attention
from qsim_core.fast.fused import followed
from qsim_core.fast.identity_cache import remembered
from qsim_core.matmuls.attention import explicit_attention
from qsim_core.quantizers.static_scale import scheme_of
from qsim_core.sites.site import Site

if TYPE_CHECKING:
    from qsim_core.sites.sites import Sites


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
) -> Tensor:
    """`explicit_attention`, which meets two products; the same numbers, however many heads are taken at a time."""
    frame = sites.thread.stack[-1]
    first = frame.products
    met = [site for i in range(2) if (site := sites.table.get(f"{frame.path}:matmul.{first + i}")) is not None]
    masked = attn_mask is None or attn_mask.dim() == query.dim()
    shapes = {tuple(t.shape[: 2 - enable_gqa]) if t.dim() == 4 else None for t in (query, key, value)}
    matching = len(shapes) == 1 and None not in shapes and key.shape[1] == value.shape[1]
    possible = len(met) == 2 and matching and masked and not dropout_p
    if not possible or not _alone(query) or not _unseen(sites, met):
        return explicit_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    calls = [site.calls + 1 for site in met]
    triangular = is_causal and attn_mask is None and query.shape[-2] == key.shape[-2] > ROWS
    result = None
    if triangular and _usual(query, key, value) and can_be_cut(*met):
        result = causal_attention(sites, met, query, key, value, scale)
        if not bool(result.sum().isfinite()):  # what is no number may reach, by a scale, what was computed without it
            result = None
    if result is None and _by_heads(met):
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        for place, operands in _heads(query, key, value, attn_mask, enable_gqa):
            frame.products = first
            result[place] = explicit_attention(*operands, 0.0, is_causal, scale)
    if result is None:
        return explicit_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    frame.products = first + len(met)
    for site, count in zip(met, calls, strict=True):
        site.calls = count
    return result


def _alone(query: Tensor) -> bool:
    """Whether it pays, and no gradient has to find its way back."""
    large = query.shape[0] * query.shape[1] > 1 and query.device.type == "cpu"
    return large and not torch.is_grad_enabled() and not followed(query)


def _usual(*operands: Tensor) -> bool:
    """Whether nobody looks on below torch's functions, nor chooses dtypes, and no operand is a parameter."""
    plain = not torch.is_autocast_enabled("cpu") and torch._C._len_torch_dispatch_stack() == 0
    return plain and len({x.dtype for x in operands}) == 1 and not any(isinstance(x, Parameter) for x in operands)


def _unseen(sites: Sites, met: list[Site]) -> bool:
    """Whether nobody looks on, and nothing is drawn for the two products as a whole."""
    looked_at = sites.observer is not None or sites.watcher is not None
    training = sites.thread.stack[-1].module.training
    if looked_at or training or not sites.quantizing or any(site.rotations for site in met):
        return False
    return not any(_draws_or_multiplies(scheme_of(quantizer)) for quantizer in _quantizers(met))


@remembered
def _draws_or_multiplies(scheme: Any) -> bool:
    return "stochastic" in str(scheme) or getattr(scheme, "multiplier", None) is not None


def _by_heads(met: list[Site]) -> bool:
    """Whether every quantizer rounds row by row, the same wherever a row stands."""
    for quantizer in _quantizers(met):
        scheme = scheme_of(quantizer)
        fixed = quantizer is not scheme and scheme.granularity == "tensor"
        if not (fixed or getattr(scheme, "by_rows", False)):
            return False
    return True


def _quantizers(met: list[Site]) -> list[Any]:
    """Those at two products, each of which may stand at several places."""
    found = (site.quantizer(role) for site in met for role in ("input", "input2", "output"))
    return [quantizer for quantizer in found if quantizer is not None]


def _heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> Iterator[tuple[tuple[slice, slice], tuple[Tensor, Tensor, Tensor, Tensor | None]]]:
    """Where a few heads of [B, H, length, width] are, and these."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    query, key = query.contiguous(), key.contiguous()
    value = value.transpose(-1, -2).contiguous().transpose(-1, -2)  # PV is summed over tokens: so they come last
    heads = max(1, TOGETHER // max(1, query.shape[-2] * key.shape[-2]))
    samples = max(1, heads // query.shape[1])
    for sample in range(0, query.shape[0], samples):
        for head in range(0, query.shape[1], heads):
            place = slice(sample, sample + samples), slice(head, head + heads)
            own = None
            if mask is not None:
                own = mask[tuple(at if size > 1 else slice(None) for at, size in zip(place, mask.shape, strict=False))]
            yield place, (query[place], key[place], value[place], own)
