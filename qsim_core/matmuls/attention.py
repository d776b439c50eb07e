"""Functions with matmuls inside, taken apart so that these can be met: above all fused attention.

`explicit_attention` is `scaled_dot_product_attention` written out. `explicit_multi_head_attention` is torch's own
`multi_head_attention_forward`, told that no function mode is there, so that it calls its matmuls one by one
instead of handing itself to the mode again.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kT * scale + mask) v, with the arguments and the meaning of torch's function.

    query [..., H, Q, D], key [..., H', K, D], value [..., H', K, E] -> [..., H, Q, E]. The scale is applied to the
    product, as eager attention does; the softmax is float32's. A row whose keys are all masked gives zeros.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    product = torch.matmul(query, key.transpose(-1, -2))
    scores = _times(product, query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = within(scores, torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril())
    if attn_mask is not None:
        scores = within(scores, attn_mask) if attn_mask.dtype == torch.bool else scores + attn_mask
    shares = probabilities(scores, query.dtype)
    if attn_mask is not None:
        nothing = scores.amax(-1, keepdim=True) == -torch.inf
        if torch.compiler.is_compiling() or bool(nothing.any()):
            shares = shares.masked_fill(nothing, 0.0)
    return torch.matmul(F.dropout(shares, dropout_p, training=dropout_p > 0), value)


def probabilities(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The softmax of scores along their last axis, computed in float32 at least."""
    return torch.softmax(scores, -1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(dtype)


def _times(scores: Tensor, scale: float) -> Tensor:
    """Scores, scaled; in their own memory where no gradient is recorded, which saves its page faults."""
    return scores * scale if torch.is_grad_enabled() else scores.mul_(scale)


def within(scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores where they are allowed, else -Inf, likewise. Of NaN nothing is hidden."""
    bound = torch.where(allowed, torch.inf, -torch.inf).to(scores.dtype)
    return torch.minimum(scores, bound) if torch.is_grad_enabled() else torch.minimum(scores, bound, out=scores)


def _without_mode(function: Any) -> Callable[..., Any]:
    globals_ = {**function.__globals__, "has_torch_function": lambda *arguments: False}
    copy = types.FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


explicit_multi_head_attention = _without_mode(F.multi_head_attention_forward)


def _addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.addbmm`: its sum runs over the batch too, so it is one product with a longer reduction axis."""
    return torch.addmm(input, batch1.transpose(0, 1).flatten(1), batch2.flatten(0, 1), beta=beta, alpha=alpha)


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Tensor:
    """`torch.tensordot` as an einsum with numbered axes."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    pairs = (list(range(a.dim() - dims, a.dim())), list(range(dims))) if isinstance(dims, int) else dims
    left = list(range(a.dim()))
    right = list(range(a.dim(), a.dim() + b.dim()))
    for mine, theirs in zip(*pairs, strict=True):
        right[theirs] = left[mine]
    kept = [axis for axis in left if axis not in right] + [axis for axis in right if axis not in left]
    result: Tensor = torch.einsum(a, left, b, right, kept)
    return result if out is None else out.copy_(result)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """An in-place method by its function that returns a new tensor."""
    return lambda self, *args, **kwargs: self.copy_(function(self, *args, **kwargs))


EXPLICIT: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: explicit_attention,
    F.multi_head_attention_forward: explicit_multi_head_attention,
    torch.addbmm: _addbmm,
    torch.Tensor.addbmm: _addbmm,
    torch.tensordot: _tensordot,
    torch.Tensor.addmm_: _in_place(torch.addmm),
    torch.Tensor.addmv_: _in_place(torch.addmv),
    torch.Tensor.baddbmm_: _in_place(torch.baddbmm),
    torch.Tensor.addbmm_: _in_place(_addbmm),
}
SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
