"""Torch functions with matmuls inside, written out so that each matmul is called by itself: above all fused attention.

`explicit_attention` is `scaled_dot_product_attention` written out. `explicit_multi_head_attention` is torch's own
`multi_head_attention_forward` without its check for a function mode. So it calls its matmuls one by one, and does not
pass its whole call to the mode again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
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
    """Compute softmax(q kT * scale + mask) v, with the arguments and the meaning of torch's function.

    query [..., H, Q, D], key [..., H', K, D], value [..., H', K, E] -> [..., H, Q, E]. The scale is applied to the
    product, as in eager attention: the operands are float32 at least, in which the product does not overflow. A row
    whose keys are all masked gives zeros.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    product = torch.matmul(query, key.transpose(-1, -2))
    scores = _times(product, query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = within(scores, causal)
    if attn_mask is not None:
        scores = within(scores, attn_mask) if attn_mask.dtype == torch.bool else scores + attn_mask
    shares = probabilities(scores, query.dtype)
    if attn_mask is not None:
        all_masked = scores.amax(-1, keepdim=True) == -torch.inf
        if torch.compiler.is_compiling() or scores.is_meta or bool(all_masked.any()):
            shares = shares.masked_fill(all_masked, 0.0)
    return torch.matmul(F.dropout(shares, dropout_p, training=dropout_p > 0), value)


def probabilities(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The softmax of scores along their last axis, computed in float32 at least, and converted to `dtype`."""
    return torch.softmax(scores, -1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(dtype)


def _times(scores: Tensor, scale: float) -> Tensor:
    """Multiply scores by the scale: in place if no gradient is recorded, which saves page faults of new memory."""
    return scores * scale if torch.is_grad_enabled() else scores.mul_(scale)


def within(scores: Tensor, allowed: Tensor) -> Tensor:
    """Set scores to -Inf where they are not allowed: in place if no gradient is recorded. NaN stays NaN everywhere."""
    bound = torch.where(allowed, torch.inf, -torch.inf).to(scores.dtype)
    return torch.minimum(scores, bound) if torch.is_grad_enabled() else torch.minimum(scores, bound, out=scores)


def _without_mode(function: Any) -> Callable[..., Any]:
    """Copy a torch function so that it takes its arguments for plain tensors, and runs its own code."""
    globals_ = {**function.__globals__, "has_torch_function": lambda *arguments: False}
    copy = types.FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


explicit_multi_head_attention = _without_mode(F.multi_head_attention_forward)


def _addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Compute `torch.addbmm`, which sums over the batch too, as one product with a longer reduction axis."""
    return torch.addmm(input, batch1.transpose(0, 1).flatten(1), batch2.flatten(0, 1), beta=beta, alpha=alpha)


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Tensor:
    """Compute `torch.tensordot` as an einsum with numbered axes."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (list(range(a.dim() - dims, a.dim())), list(range(dims)))
    left = list(range(a.dim()))
    right = list(range(a.dim(), a.dim() + b.dim()))
    for axis_of_a, axis_of_b in zip(*dims, strict=True):
        right[axis_of_b] = left[axis_of_a]
    kept = [axis for axis in left if axis not in right] + [axis for axis in right if axis not in left]
    result: Tensor = torch.einsum(a, left, b, right, kept)
    return result if out is None else out.copy_(result)


def _multi_dot(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Compute `torch.linalg.multi_dot` product by product, in the order that takes the fewest multiplications."""
    rows = [1 if tensors[0].dim() == 1 else len(tensors[0]), *map(len, tensors[1:])]
    sizes = [*rows, 1 if tensors[-1].dim() == 1 else tensors[-1].shape[-1]]

    @functools.cache
    def best(first: int, end: int) -> tuple[int, int]:
        """The multiplications that a part of the chain takes, and the place where it is divided."""
        places = range(first + 1, end)
        costs = (sizes[first] * sizes[p] * sizes[end] + best(first, p)[0] + best(p, end)[0] for p in places)
        return min(zip(costs, (-p for p in places), strict=True), default=(0, 0))

    def product(first: int, end: int) -> Tensor:
        place = -best(first, end)[1]
        return torch.matmul(product(first, place), product(place, end)) if place else tensors[first]

    result = product(0, len(tensors))
    return result if out is None else out.copy_(result)


def _conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Compute `torch.conv_tbc`, input [T, B, C] and weight [taps, C, O], as a convolution in torch's usual layout."""
    result: Tensor = F.conv1d(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad)
    return result.permute(2, 0, 1)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an in-place method from the function that returns a new tensor."""
    return lambda self, *args, **kwargs: self.copy_(function(self, *args, **kwargs))


EXPLICIT: dict[Callable[..., Any], Callable[..., Any]] = {  # the torch function, and its written-out form
    F.scaled_dot_product_attention: explicit_attention,
    F.multi_head_attention_forward: explicit_multi_head_attention,
    torch.addbmm: _addbmm,
    torch.Tensor.addbmm: _addbmm,
    torch.tensordot: _tensordot,
    torch.linalg.multi_dot: _multi_dot,
    torch.chain_matmul: lambda *matrices: _multi_dot(matrices),
    torch.conv_tbc: _conv_tbc,
    torch.Tensor.addmm_: _in_place(torch.addmm),
    torch.Tensor.addmv_: _in_place(torch.addmv),
    torch.Tensor.baddbmm_: _in_place(torch.baddbmm),
    torch.Tensor.addbmm_: _in_place(_addbmm),
}
SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
