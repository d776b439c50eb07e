"""Find the parameter that a tensor belongs to by its memory address, so that views and slices are found too."""

from __future__ import annotations

import bisect
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Named = tuple[str, Tensor]


class ParameterAddresses:
    """The parameters of a model by their addresses. A tied parameter has the first of its names."""

    def __init__(self, model: nn.Module) -> None:
        named = {_address(p): (n, p) for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self._addresses = sorted(address for address in named if address)
        self._parameters = [named[address] for address in self._addresses]
        self._copies = WeakTensorKeyDictionary()

    def of(self, tensor: Any) -> Named | None:
        """Return the name and the parameter that a tensor is a view of; of a copy, the name and the view it copies."""
        if not isinstance(tensor, Tensor):
            return None
        if (copied := self._copies.get(tensor)) is not None:
            name, original = copied
            return (name, original) if tensor.shape == original.shape else None
        address = _address(tensor)
        place = bisect.bisect_right(self._addresses, address) - 1
        if place < 0:
            return None
        name, parameter = self._parameters[place]
        inside = address < self._addresses[place] + parameter.numel() * parameter.element_size()
        return (name, parameter) if inside and tensor.dtype == parameter.dtype else None

    def copied(self, tensor: Tensor, copy: Tensor) -> None:
        """Record that a tensor was copied or cast."""
        if (found := self.of(tensor)) is not None:
            earlier = self._copies.get(tensor)
            self._copies[copy] = found[0], tensor if earlier is None else earlier[1]


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 for one without, such as a sparse tensor."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0
