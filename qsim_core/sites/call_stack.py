"""Who is running: one site for each matmul, and the stack of modules that each thread is inside of."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from qsim_core.fast.fused import as_written
from qsim_core.matmuls.layout import LAST, Layout
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import scheme_of
from qsim_core.sites.site import Site
from qsim_core.sites.workspace import Scratch


@dataclass
class Frame:
    """One running module: how many products it has computed, and what its softmax may connect."""

    path: str
    module: nn.Module
    products: int = 0
    before_softmax: list[tuple[Site, torch.Size]] = field(default_factory=list)
    softmax: tuple[torch.Size, ...] = ()
    """The shapes that P may have: the softmax's, and that of the scores where sinks stood beside them."""

    def own(self, tensor: Tensor) -> str | None:
        """The full name of the parameter that a tensor is, if it is this module's own (functional_call's too)."""
        for name, parameter in self.module._parameters.items():
            if parameter is tensor:
                return self.full(name)
        return None

    def inside(self, tensor: Tensor) -> str | None:
        """The same for parameters of the modules inside this one."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter is tensor:
                return self.full(name)
        return None

    def full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


@dataclass(frozen=True)
class Last:
    """What a function made of a tensor the last time: q, k and v have the same input, one after another."""

    function: Any
    of: Tensor
    version: int
    value: Any

    @staticmethod
    def holds(last: Last | None, function: Any, x: Tensor) -> bool:
        if last is None or last.of is not x or last.version != x._version or torch.is_grad_enabled():
            return False  # with gradients x may want one, and the value may be in memory that is used again
        return last.function is function or bool(last.function == function)


class Thread(threading.local):
    """What one thread is running."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []
        self.mode: TorchFunctionMode | None = None
        self.caller: FrameType | None = None
        self.inside = False
        self.quantized: Last | None = None
        self.lowered: Last | None = None
        self.rotated: Last | None = None
        self.scratch = Scratch()

    def clear(self) -> None:
        self.stack, self.caller, self.inside = [], None, False
        self.quantized = self.lowered = self.rotated = None
        self.scratch.clear()
        mode, self.mode = self.mode, None
        if mode is not None:
            leave(mode)

    def own_memory(self, site: Site, quantizer: Any, use: str) -> AbstractContextManager[None]:
        """Inside, an input that is quantized for a product with a weight, and seen by nobody else, is in memory that
        the next one uses again."""
        written_here = isinstance(scheme := scheme_of(quantizer), Scheme) and as_written(type(scheme))
        followed = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
        if site.weight is None or not written_here or followed:
            return nullcontext()
        return self.scratch.wanted(use)

    def running(self) -> bool:
        """Whether the outermost module's call is still on the Python stack: Ctrl-C leaves without any hook."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None


def leave(mode: TorchFunctionMode) -> None:
    """Take a mode off torch's stack, also from under others: after Ctrl-C it may not be the topmost any more."""
    above = []
    while _len_torch_function_stack() > 0:
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


def widened(product: torch.Size, scores: torch.Size) -> bool:
    """Whether scores are a product with columns beside it: attention sinks, which take a share of the softmax."""
    return len(product) == len(scores) > 1 and product[:-1] == scores[:-1] and product[-1] < scores[-1]


def last_of(function: Any, x: Tensor, value: Any, layout: Layout) -> Last | None:
    """What may be used again for the same tensor; nothing where gradients are recorded."""
    shareable = layout is LAST and not torch.is_grad_enabled() and not x.is_inference()
    return Last(function, x, x._version, value) if shareable else None


def recomputing() -> bool:
    """Whether this runs inside a backward pass: gradient checkpointing computes a forward again there."""
    return bool(torch._C._current_graph_task_id() != -1)
