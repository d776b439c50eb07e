"""A mode that watches the operators that torch computes, below autograd, and changes none of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorWatcher(TorchDispatchMode):
    """A dispatch mode that only watches. Operators that hold a function, like flex_attention, run under it too."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: flex_attention compiles itself, and refuses to do so under a mode that could change its results."""
        return True


def unwatched() -> Any:
    """Leave the operators that are computed inside to torch alone, without a call of any watcher."""
    return torch._C._DisableTorchDispatch()


def operator_name(func: Any) -> str:
    """The name of an operator without its overload: `add_` for `aten.add_.Tensor`."""
    return str(getattr(func, "overloadpacket", func).__name__)
