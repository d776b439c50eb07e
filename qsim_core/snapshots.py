"""A tensor as it was when it was seen, from which a later change is noticed by the tensor's values.

Torch's own counter of versions is not enough: fused optimizers, collective operations and writes through
`parameter.data` leave it as it is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the integers that have its bits."""


class Snapshot:
    """The identity, version and address of a tensor, a sample of its values, and sums of all if `whole`."""

    def __init__(self, tensor: Tensor, whole: bool = False) -> None:
        self._kind = tensor.dtype, tensor.shape
        self._sums = _sums(tensor) if whole else None
        self._note(tensor)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reference to the tensor: a copied model has another one."""
        return {**self.__dict__, "_of": None}

    def _note(self, tensor: Tensor) -> None:
        self._of: weakref.ref[Tensor] | None = weakref.ref(tensor)  # a new tensor may get a freed one's id
        self._mark = _mark(tensor)
        found = sample(tensor)
        self._sample = found.clone()
        plain = has_memory(tensor) and tensor.is_contiguous()
        self._places = (found.dtype, found.shape, found.stride()) if plain else None
        self._doubted = self._compared = False

    def is_of(self, tensor: Tensor) -> bool:
        """Tell if this tensor object was seen."""
        return self._of is not None and self._of() is tensor

    def doubt(self) -> None:
        """Have all values compared the next time."""
        self._doubted = True

    def holds(self, tensor: Tensor) -> bool:
        """Tell if the tensor is the one that was seen, and has not moved, nor have its sampled values changed.

        After `whole` another tensor holds too, if all of its values are those that were seen.
        """
        same = self._stands(tensor) and not self._doubted
        if same and self._compared:
            return True
        if self._kind != (tensor.dtype, tensor.shape):
            return False
        if same and self._places is not None:
            dtype, shape, stride = self._places
            return torch.equal(self._sample, tensor.detach().view(dtype).as_strided(shape, stride))
        if not _alike(self._sample, sample(tensor)):
            return False
        if not same and self._sums is not None and _alike(self._sums, _sums(tensor)):
            self._note(tensor)
            return True
        return same

    def _stands(self, tensor: Tensor) -> bool:
        if self._of is None or self._of() is not tensor:
            return False
        return self._mark == (_mark(tensor) if self._places is None else (_version(tensor), tensor.data_ptr()))

    @staticmethod
    def compare(seen: Iterable[Snapshot]) -> None:
        """Compare the samples of tensors that are not on the CPU, all at once; `holds` then need not wait for a device.

        What is written to them afterwards, during the same forward, is noticed by the next.
        """
        standing = defaultdict(list)
        for one in seen:
            tensor, one._compared = None if one._of is None else one._of(), False
            if tensor is not None and tensor.device.type != "cpu" and one._stands(tensor):
                standing[tensor.device].append((one, sample(tensor)))
        for found in standing.values():
            then, now = torch.cat([one._sample for one, _ in found]), torch.cat([values for _, values in found])
            alike = _alike(then, now)
            for one, _ in found:
                one._compared = alike


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of tensors' names, dtypes, shapes, and sums of all bits: where one element changes, it changes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sums = _sums(tensor if tensor.layout is torch.strided else tensor.to_dense()).cpu()
        found.update(octets(sums))
    return found.hexdigest()


def has_memory(tensor: Tensor) -> bool:
    """True if a tensor holds numbers itself: it is not sparse, sharded, coded or wrapped, nor kept elsewhere."""
    plain = type(tensor) in (nn.Parameter, Tensor)
    wrapped = is_functorch_wrapped_tensor(tensor) or (not plain and is_traceable_wrapper_subclass(tensor))
    return not (tensor.is_meta or tensor.layout is not torch.strided or wrapped)


def stored_as(tensor: Tensor) -> str | None:
    """Name the form of a tensor's values: a class of sharded or coded tensors, or float8; None: plain numbers."""
    if is_traceable_wrapper_subclass(tensor):
        return type(tensor.data).__name__
    tiny = tensor.is_floating_point() and tensor.element_size() == 1
    return str(tensor.dtype).removeprefix("torch.") if tiny else None


def octets(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU as a buffer of bytes, for as long as the tensor lives."""
    return (ctypes.c_uint8 * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


def sample(tensor: Tensor) -> Tensor:
    """Give the bits of some elements of a tensor: one or more of each row and column, about max(N, K) of N x K.

    Of a tensor without memory of its own, such as a sharded one, there is no sample, and it never holds.
    """
    if not has_memory(tensor):
        return torch.full((1,), math.nan)
    step = _step(tensor.numel(), tensor.shape)
    if not tensor.is_contiguous():
        return _in_memory(tensor)[::step]
    return tensor.detach().view(BITS[tensor.element_size()]).as_strided((-(-tensor.numel() // step),), (step,))


def _in_memory(tensor: Tensor) -> Tensor:
    """The bits of all elements as they lie in memory; a copy of them where there are gaps between them."""
    bits = tensor.detach().view(BITS[tensor.element_size()])
    if bits.is_contiguous():
        return bits.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(bits.shape, bits.stride(), strict=True))
    return bits.as_strided((span,), (1,)) if span == bits.numel() else bits.reshape(-1)


@functools.lru_cache(maxsize=4096)
def _step(count: int, shape: torch.Size) -> int:
    """Choose the distance of sampled elements in memory. A matrix is what is left of the axis that parts best.

    Without a factor in common with the number of elements, all columns have their turn.
    """
    if count == 0:
        return 1
    sides = (math.prod(shape[axis:]) for axis in range(len(shape) + 1))
    step = max(min(side, count // side) for side in sides)
    while math.gcd(step, count) > 1:
        step -= 1
    return step


def _alike(then: Tensor, now: Tensor) -> bool:
    return then.shape == now.shape and torch.equal(then if then.device == now.device else then.to(now.device), now)


def _mark(tensor: Tensor) -> tuple[int, int]:
    if not has_memory(tensor):
        return 0, 0
    return _version(tensor), tensor.data_ptr()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sums(tensor: Tensor) -> Tensor:
    """Sum the bits of all elements, eight bytes at a time, along the rows and columns of a table of 1024 columns.

    The sums are exact, and the same on every device. An element that changes changes two of them.
    """
    bits = _in_memory(tensor)
    bits = bits.clone() if bits.storage_offset() * bits.element_size() % 8 else bits
    rest = len(bits) % (1024 * 8 // bits.element_size())
    table, tail = bits[: len(bits) - rest].view(torch.int64).view(-1, 1024), bits[len(bits) - rest :]
    return torch.cat([table.sum(0), table.sum(1), tail.long()])
