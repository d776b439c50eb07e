"""Fused attention, taken apart so that its two products can be met.

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
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    probabilities = torch.softmax(scores, -1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    if attn_mask is not None:
        probabilities = probabilities.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return torch.matmul(F.dropout(probabilities, dropout_p, training=dropout_p > 0), value)


def _without_mode(function: Any) -> Callable[..., Any]:
    globals_ = {**function.__globals__, "has_torch_function": lambda *arguments: False}
    copy = types.FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


explicit_multi_head_attention = _without_mode(F.multi_head_attention_forward)

EXPLICIT: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: explicit_attention,
    F.multi_head_attention_forward: explicit_multi_head_attention,
}
SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
