"""Numbers dispose: an edit that tracing proposes is tried, and every product of the model must come out as before.

End to end a wrong fold can be invisible (a tiny model's logits hardly depend on its attention): each product with a
weight is compared, and for edits inside attention each product of activations too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core.addresses import Parameters
from qsim_core.channels import WITH_WEIGHT
from qsim_core.dispatch import Watcher, operator_name
from qsim_core.errors import ModelError
from qsim_core.forward import Example, as_in_evaluation, call

TOLERANCE = 2e-4
"""Of the largest value of each product; in half precision eight steps of it (a wrong fold changes 14% and more)."""
ROWS = 256
"""So many rows of each product are kept, from all over it: an edit changes a channel in every row."""
ACTIVATIONS = ""
"""The name of the products of two activations, which have no weight's."""


@dataclass(frozen=True)
class Edit:
    """A change that should leave the function alone, and how to go about it."""

    apply: Callable[[], RemovableHandle | None]
    parameters: frozenset[str]
    """Parameters, or modules with all of theirs, that it changes."""
    producers: frozenset[str]
    """Weights whose own products change: their channels are in another order, or scaled."""
    refuse: Callable[[str], None]
    """Called with the reason, if a product changes that should not."""
    attention: bool = False
    """Whether it leaves products of activations alone too."""


def dispose(model: nn.Module, example: Example, edits: Sequence[Edit], reason: str) -> None:
    """Try all edits at once, and where a product changes one by one; those that change one are refused."""
    if not edits:
        return
    exact = _products(model, example)
    if _holds(model, example, edits, exact):
        return
    for edit in edits:
        if not _holds(model, example, [edit], exact):
            edit.refuse(reason)


def _holds(model: nn.Module, example: Example, edits: Sequence[Edit], exact: dict[str, list[Tensor]]) -> bool:
    """Whether every product but the producers' own comes out as before; the model is put back."""
    touched = {name for edit in edits for name in edit.parameters}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {n: p.detach().clone() for n, p in parameters.items() if n in touched or n.rpartition(".")[0] in touched}
    handles: list[RemovableHandle | None] = []
    try:
        handles.extend(edit.apply() for edit in edits)
        edited = _products(model, example)
    except ModelError:
        return False
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()
        with torch.no_grad():
            for name, values in kept.items():
                parameters[name].copy_(values)
    ignored = {name for edit in edits for name in edit.producers}
    if not all(edit.attention for edit in edits):
        ignored.add(ACTIVATIONS)
    return all(_same(before, edited.get(name, [])) for name, before in exact.items() if name not in ignored)


def _same(before: Iterable[Tensor], after: Sequence[Tensor]) -> bool:
    before = list(before)
    return len(before) == len(after) and all(_close(a, b) for a, b in zip(before, after, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    tolerance = max(TOLERANCE, 8 * torch.finfo(a.dtype).eps)
    return bool((a.double() - b.double()).abs().max() <= tolerance * a.double().abs().max().clamp(min=1e-30))


class _Recorder(Watcher):
    """Keeps the results of all products: those with a parameter by the parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = Parameters(model)
        self.results: dict[str, list[Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = operator_name(func)
        places = WITH_WEIGHT.get(name) or ((0, 1) if "convolution" in name else None)
        if places is not None:
            found = self.parameters.of(args[places[1]]) or self.parameters.of(args[places[0]])
            self.results[found[0] if found else ACTIVATIONS].append(_rows(out, 1 if "convolution" in name else -1))
        elif "scaled_dot_product" in name:
            query, key = args[0].detach(), args[1].detach()
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1) if query.dim() > 3 else key
            self.results[ACTIVATIONS].append(_rows(query @ key.transpose(-1, -2), -1))
        return out


def _rows(product: Tensor, channels: int) -> Tensor:
    """At most `ROWS` rows of a product, evenly spread, each with all its channels."""
    rows = product.detach().movedim(channels, -1).flatten(0, -2)
    if len(rows) <= ROWS:
        return rows.clone()
    return rows[torch.linspace(0, len(rows) - 1, ROWS, device=rows.device).long()]


def _products(model: nn.Module, example: Example) -> dict[str, list[Tensor]]:
    recorder = _Recorder(model)
    with as_in_evaluation(model), recorder:
        call(model, example)
    return dict(recorder.results)
