"""A parameter that holds codes in the place of its values, until other code than its matmul reads it."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Coded(Protocol):
    """Codes that stand for values."""

    def values(self) -> Tensor:
        """Compute the values in float32."""


class CodedParameter(nn.Parameter):
    """A parameter whose memory holds codes.

    Every operation of torch sees its values. The first one that reads or changes it computes them, and they take the
    place of the codes from then on: a view of them, or a change, lasts as with any parameter.
    """

    codes: Coded | None
    """The codes; None after another operation has read or changed the parameter."""
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    def __new__(cls, of: nn.Parameter, codes: Coded) -> CodedParameter:
        """Make a parameter like `of`, with the values of these codes."""
        made: CodedParameter = torch.Tensor._make_wrapper_subclass(
            cls, of.shape, of.stride(), dtype=of.dtype, device=of.device, requires_grad=of.requires_grad
        )
        made.codes, made._plain = codes, None
        return made

    def __init__(self, of: nn.Parameter, codes: Coded) -> None:
        self._plain: Tensor | None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        met: dict[int, CodedParameter] = {}

        def plain(x: CodedParameter) -> Tensor:
            met[id(x.plain())] = x
            return x.plain()

        given, named = tree_map_only(CodedParameter, plain, (args, kwargs or {}))
        result = func(*given, **named)
        return tree_map_only(Tensor, lambda x: met.get(id(x), x), result)  # an operation in place gives its operand

    def plain(self) -> Tensor:
        """Give the values; they take the place of the codes."""
        if self._plain is None:
            assert self.codes is not None
            with torch.inference_mode(False), torch.no_grad():
                self._plain = self.codes.values()
            self.codes = None
        return self._plain

    def data_ptr(self) -> int:
        """Give the address of the values; they take the place of the codes."""
        return self.plain().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Give the memory of the values; they take the place of the codes."""
        return self.plain().untyped_storage()

    @property
    def data(self) -> Tensor:
        """The values; they take the place of the codes."""
        return self.plain().detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]
        self.codes, self._plain = None, values.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy the values."""
        values = self.codes.values() if self.codes is not None else self.data.clone()
        return nn.Parameter(values, self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Write the values."""
        return copy.deepcopy(self).__reduce_ex__(protocol)


PARAMETERS = (nn.Parameter, CodedParameter)
"""The classes of parameters whose values qsim reads and overwrites."""
