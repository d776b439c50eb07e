"""The stack of running modules of each thread, and the tensors that their calls share."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from qsim_core.formats.uncompiled import compilers
from qsim_core.matmuls.layout import LAST, Layout
from qsim_core.sites.site import Site
from qsim_core.sites.workspace import Memory, Workspace, like


@dataclass
class Frame:
    """One running module, the count of its products of activations, and those that a softmax may connect."""

    path: str
    module: nn.Module
    products: int = 0
    before_softmax: list[tuple[Site, torch.Size]] = field(default_factory=list)
    softmax: tuple[torch.Size, ...] = ()
    """The shapes that the probabilities may have: that of the softmax, and without the columns of attention sinks."""
    operations: Any = None
    """The state of the module's operations between products, which `OperationSites` keep here."""
    explicit: bool = False
    """True while torch's own attention is written out: the sums in it add masks."""
    compiling: Any = None
    """The state of torch.compile before this module, which `resume_compiling` brings back."""

    def own(self, tensor: Tensor) -> str | None:
        """The full name of the parameter that a tensor is, if it is this module's own (also under functional_call)."""
        for name, parameter in self.module._parameters.items():
            if parameter is tensor:
                return self.full(name)
        return None

    def inside(self, tensor: Tensor) -> str | None:
        """The full name of the parameter that a tensor is, if it belongs to a module inside this one."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter is tensor:
                return self.full(name)
        return None

    def full(self, name: str) -> str:
        """Put this module's path before a name."""
        return f"{self.path}.{name}" if self.path else name


@dataclass(frozen=True)
class Reusable:
    """The last result of a function of a tensor, kept for the next call: q, k and v have the same input."""

    function: Any
    of: Tensor
    """The tensor that the function was applied to."""
    version: int
    """The version of that tensor at the time: an in-place change raises it."""
    value: Any

    @staticmethod
    def holds(last: Reusable | None, function: Any, x: Tensor) -> bool:
        """Tell if `last` is the result of this function of `x`.

        False while gradients are recorded: `x` may need one, and the value may lie in memory that is used again.
        """
        if last is None or last.of is not x or last.version != x._version or torch.is_grad_enabled():
            return False
        return last.function is function or bool(last.function == function)


def reusable(function: Any, x: Tensor, value: Any, layout: Layout) -> Reusable | None:
    """Keep a value for the next call with the same tensor; None if it cannot be shared, as with gradients."""
    shareable = layout is LAST and not torch.is_grad_enabled() and not x.is_inference()
    return Reusable(function, x, x._version, value) if shareable else None


class CallStack(threading.local):
    """The running modules of one thread, outermost first, and the tensors that it keeps until the outermost ends."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.mode: TorchFunctionMode | None = None
        """The mode that sees every call of torch while the outermost module runs."""
        self.caller: FrameType | None = None
        """The Python frame that called the outermost module."""
        self.inside = False
        """True while a site computes."""
        self.error: Exception | None = None
        """The first error that a site has raised in this forward."""
        self.quantized: Reusable | None = None
        self.lowered: Reusable | None = None
        self.rotated: Reusable | None = None
        self.workspace = Workspace()

    def begin(self, mode: TorchFunctionMode, caller: FrameType) -> None:
        """Enter the outermost module."""
        self.mode, self.caller, self.error = mode, caller, None
        compilers.hold()
        mode.__enter__()

    def clear(self) -> None:
        """Leave all modules, and forget the kept tensors."""
        self.frames, self.caller, self.inside = [], None, False
        self.share_nothing()
        self.workspace.clear()
        mode, self.mode = self.mode, None
        if mode is not None:
            leave(mode)
            compilers.release()

    def share_nothing(self) -> None:
        """Forget the tensors that calls share."""
        self.quantized = self.lowered = self.rotated = None

    def memory(self, site: Site, use: str) -> Memory | None:
        """The memory in which the input of a weight is quantized, used again by the next site; None for fresh memory.

        Memory is used again only if no gradient is recorded and no dispatch mode sees the tensor.
        """
        if site.weight is None or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0:
            return None
        return Memory(self.workspace, use)

    def memory_like(self, site: Site, use: str, rows: Tensor) -> Tensor | None:
        """The same memory as a tensor like `rows`: shape, strides, dtype; None if `rows` are not dense on the CPU."""
        if rows.device.type != "cpu":
            return None
        memory = self.memory(site, use)
        if memory is None:
            return None
        if rows.is_contiguous():
            return self.workspace.empty(use, rows.shape, rows.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
        return like(memory, rows) if span == rows.numel() else None

    def running(self) -> bool:
        """Tell if the call of the outermost module is still on the Python stack: after Ctrl-C no hook runs."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None


def leave(mode: TorchFunctionMode) -> None:
    """Remove a mode from torch's stack, even below other modes: after Ctrl-C it may not be on top any more."""
    above = []
    while _len_torch_function_stack() > 0:
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


def recomputing() -> bool:
    """Tell if this runs inside a backward pass, in which gradient checkpointing computes a forward again."""
    return bool(torch._C._current_graph_task_id() != -1)
