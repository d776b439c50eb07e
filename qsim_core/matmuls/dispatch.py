"""Watching what torch computes, operator by operator, below autograd and without changing any of it."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorWatcher(TorchDispatchMode):
    """A dispatch mode that only watches: operators that hold a function, like flex_attention, run under it too."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """flex_attention compiles itself, and refuses to under a mode that could change what it computes."""
        return True


def operator_name(func: Any) -> str:
    """`add_` for `aten.add_.Tensor`: the operator's name, whichever its overload."""
    return str(getattr(func, "overloadpacket", func).__name__)
