"""Input rows [T, K] of each matrix of a weight, one set for each group or expert.

A weight is treated as G matrices [N, K]. A linear layer has one, a convolution one for each group, and a parameter that
holds experts one for each expert. The rows of a convolution are the patches of its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core import QsimError
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.operators import GROUPED, OPS


class Unseen(QsimError):
    """The input rows of a weight are unknown for a call of this kind."""


def matrices(call: Call, place: int) -> int:
    """Count the matrices of the weight that is operand number `place` of a call."""
    rows = call.layouts[place].rows(call.operands[place])
    return 1 if call.operation == "einsum" else rows.shape[:-2].numel()


def samples(call: Call, place: int) -> Iterator[list[Tensor]]:
    """Yield the input rows [T, K] of each matrix of a weight, in portions. Raises `Unseen`."""
    if len(call.operands) != 2:
        raise Unseen(f"it stands in an einsum of {len(call.operands)} operands")
    weight, x = (call.layouts[i].rows(call.operands[i].detach()) for i in (place, 1 - place))
    op = OPS.get(call.function)
    if op is not None and op.space:
        named = dict(zip(op.parameters, call.args, strict=False)) | call.kwargs
        images = call.operands[1 - place].detach()
        images = images if images.dim() == op.space + 2 else images.unsqueeze(0)
        for image in images.split(1):  # patches take many times the memory of their image
            yield list(_patches(image, named, call.operation, op.space))
    elif call.operation == "einsum":
        rows = weight.numel() // weight.shape[-1] * (x.numel() // x.shape[-1])
        if call.run([torch.empty_like(operand, device="meta") for operand in call.operands]).numel() != rows:
            raise Unseen("it stands in an einsum that shares an axis without summing over it")
        yield [x.reshape(-1, x.shape[-1])]
    elif call.function in GROUPED and x.dim() == 2 and weight.dim() == 3:
        ends = (call.kwargs["offs"] if "offs" in call.kwargs else call.args[2]).tolist()
        yield [x[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    else:
        yield list(_facing(x, weight.shape[:-2]))


def _facing(x: Tensor, matrices: torch.Size) -> Tensor:
    """Return the rows [..., M, K] that a batched product pairs with matrices [*matrices, N, K], as [G, T, K]."""
    x = x.unsqueeze(0) if x.dim() == 1 else x
    both = torch.broadcast_shapes(x.shape[:-2], matrices)
    x = x.expand(*both, *x.shape[-2:])
    padded = (1,) * (len(both) - len(matrices)) + tuple(matrices)
    kept = [axis for axis, size in enumerate(padded) if size > 1]
    summed = [axis for axis in range(len(both)) if axis not in kept]
    return x.permute(*kept, *summed, -2, -1).reshape(matrices.numel(), -1, x.shape[-1])


def _patches(image: Tensor, named: dict[str, Any], operation: str, space: int) -> Tensor:
    """Return the patches of an image [1, C, *space]: [groups, places, taps * C / groups], channels fastest.

    A transposed convolution is treated as a convolution of the input with zeros between its pixels and a reversed
    kernel.
    """

    def each(option: str, default: int) -> list[int]:
        value = named.get(option, default)
        return [value] * space if isinstance(value, int) else list(value)

    stride, dilation, padding = each("stride", 1), each("dilation", 1), named.get("padding", 0)
    reach = [d * (k - 1) for d, k in zip(dilation, named["weight"].shape[2:], strict=True)]
    if padding == "same":
        before = [r // 2 for r in reach]
        after = [r - b for r, b in zip(reach, before, strict=True)]
    else:
        before = after = [0] * space if padding == "valid" else each("padding", 0)
    if "transpose" in operation:
        before = [r - b for r, b in zip(reach, before, strict=True)]
        after = [r - a + extra for r, a, extra in zip(reach, after, each("output_padding", 0), strict=True)]
        for axis, step in enumerate(stride, start=2):
            image = _spread(image, axis, step)
        stride = [1] * space
    image = F.pad(image, [side for axis in reversed(range(space)) for side in (before[axis], after[axis])])
    for axis in range(space):
        image = image.unfold(2 + axis, reach[axis] + 1, stride[axis])[..., :: dilation[axis]]
    if "transpose" in operation:
        image = image.flip(tuple(range(2 + space, 2 + 2 * space)))
    groups: Tensor = image.unflatten(1, (named.get("groups", 1), -1))  # [1, groups, C / groups, *places, *taps]
    return groups.movedim(2, -1).flatten(-1 - space).flatten(2, 1 + space).squeeze(0)


def _spread(image: Tensor, axis: int, step: int) -> Tensor:
    """Insert `step` - 1 zeros between neighbouring elements along an axis."""
    spread = torch.stack([image, *[torch.zeros_like(image)] * (step - 1)], axis + 1).flatten(axis, axis + 1)
    return spread.narrow(axis, 0, (image.shape[axis] - 1) * step + 1)
