"""Stops a training at the first NaN or Inf, and names the step and the layer where it began."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core.errors import TrainingError


class Watch:
    """Checks a model's loss in every forward, before its gradient is taken, and the gradient of every parameter.

    A model whose output has no loss is checked by its output. `step` gives the number of the step for the message.
    """

    def __init__(self, model: nn.Module, step: Callable[[], int]) -> None:
        self.model, self.step = model, step
        self.finite: list[tuple[str, Tensor]] = []
        self.handles: list[RemovableHandle] = [model.register_forward_hook(self._look, with_kwargs=True)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._noting(name)))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def check_gradients(self) -> None:
        """Raise `TrainingError` if a gradient since the last check was NaN or Inf: the one that was computed first."""
        noted, self.finite = self.finite, []
        if noted and not torch.stack([finite for _, finite in noted]).all():
            name = next(name for name, finite in noted if not finite)
            raise TrainingError(f"step {self.step()}: the loss is finite and the gradient of {name} is not; lower --lr")

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.finite.append((name, parameter.grad.isfinite().all()))

        return note

    def _look(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = _loss(output)
        if not model.training or (math.isfinite(loss) if loss is not None else not _bad(output)):
            return
        self.remove()
        what = "the output is not finite" if loss is None else f"the loss is {loss}"
        raise TrainingError(f"step {self.step()}: {what}{_where(model, args, kwargs)}")


def _loss(output: Any) -> float | None:
    """The loss that a model's output holds, as transformers' do: under its name, or first in a tuple."""
    loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    return float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _where(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> str:
    """The end of a message: the weight that is not finite, or the module whose output is the first such one."""
    for name, parameter in model.named_parameters():
        if _bad(parameter):
            return f", as {name} is not finite any more"
    found: list[str] = []

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and _bad(output) and not _bad((args, kwargs)):
                found.append(path)

        return hook

    handles = [
        module.register_forward_hook(look(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return f"; the first that is not finite is the output of {found[0]}" if found else ""


def _bad(tree: Any) -> bool:
    """True if a tensor in the tree holds NaN or +Inf. -Inf is allowed, as masks are made of it."""
    return any(bool((t.isnan() | (t == torch.inf)).any()) for t in _tensors(tree) if t.is_floating_point())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree.detach()
    elif isinstance(tree, Mapping | list | tuple):
        parts: Iterable[Any] = tree.values() if isinstance(tree, Mapping) else tree
        for part in parts:
            yield from _tensors(part)
