"""Run a model and watch every operator that torch computes, below autograd, without changing any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorWatcher(TorchDispatchMode):
    """A dispatch mode that only watches. Operators that take a function, like flex_attention, run under it too."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return true: flex_attention compiles itself, and refuses to do so under other modes."""
        return True


def operator_name(func: Any) -> str:
    """Name an operator without its overload: `add_` for `aten.add_.Tensor`."""
    return str(getattr(func, "overloadpacket", func).__name__)


def run_watched(model: nn.Module, run: Callable[[], Any], watcher: OperatorWatcher) -> Any:
    """Call `run` under a watcher, with the model in eval mode and without gradients.

    torch's generators start from 0, so that two runs draw the same random numbers. Modes, generators and buffers are
    restored.
    """
    with torch.no_grad(), in_eval_mode(model), _seeded(), _buffers_kept(model), watcher:
        return run()


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode, and back on exit."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else [])]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(0)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give all buffers back their values on exit, for a model that counts its calls or keeps what it saw."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            setattr(module, name, buffer)
            buffer.copy_(values)
