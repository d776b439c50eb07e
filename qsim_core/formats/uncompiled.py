"""Code that torch.compile leaves alone.

A compiler drops the rounding of a value that is cast to bfloat16 and back, and joins roundings to the arithmetic around
them. So quantizers, and the forward of a simulated model, always run as they are written.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

UNCOMPILED = "qsim computes to the bit, without a compiler; leave fullgraph=True out"
"""The reason that torch gives where `fullgraph=True` asks it to compile such code."""

Function = TypeVar("Function", bound=Callable[..., Any] | None)


def uncompiled(function: Function, inside: bool = True) -> Function:
    """Mark a function, so that torch.compile leaves its code as it is, and `inside` all the code that it calls."""
    if isinstance(function, FunctionType):
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = UNCOMPILED  # type: ignore[attr-defined]
        skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        strategy = eval_frame._FrameExecStrategy(skip, skip if inside else default)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


stop_compiling = functools.partial(eval_frame.set_eval_frame, None)
"""Leaves all code from here on uncompiled, in this thread. Gives what `resume_compiling` takes."""
resume_compiling = eval_frame.set_eval_frame
"""Goes on as before `stop_compiling`."""


class _Compilers:
    """The compilers of functions that a forward calls: while any simulated forward runs, torch runs them uncompiled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.forwards = 0
        self.before: Any = None
        """The stance of torch.compile that takes the place of torch's own, and knows that one."""

    def hold(self) -> None:
        """Begin a forward. Without torch's compiler in this process no function is compiled."""
        with self.lock:
            self.forwards += 1
            if self.before is None and "torch._dynamo" in sys.modules:
                self.before = torch.compiler.set_stance("force_eager")

    def release(self) -> None:
        """End a forward."""
        with self.lock:
            self.forwards -= 1
            if self.forwards == 0 and self.before is not None:
                self.before.__exit__(None, None, None)
                self.before = None


compilers = _Compilers()
