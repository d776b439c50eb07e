"""Numbers dispose: an edit that tracing proposes is tried, and every product of the model must come out as before.

End to end a wrong fold can be invisible (a tiny model's logits hardly depend on its attention): each product with a
weight is compared, and for edits inside attention each product of activations too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core.errors import ModelError
from qsim_core.matmuls.dispatch import Watcher, operator_name
from qsim_core.structure.addresses import Parameters
from qsim_core.structure.channels import WITH_WEIGHT
from qsim_core.transforms.forward import Example, as_in_evaluation, call

TOLERANCE = 2e-4
"""Of the largest value of each product; in half precision eight steps of it (a wrong fold changes 14% and more)."""
ROWS = 256
"""So many rows of each product are kept, from all over it: an edit changes a channel in every row."""
PORTION = 2**26
"""Bytes of weights that are copied while edits are tried, or more of a large model."""
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
    """Try many edits at once, and where a product changes one by one; those that change one are refused."""
    if not edits:
        return
    exact = _Recorder(model)
    _run(model, example, exact)
    for some in _portions(model, edits):
        if not _holds(model, example, some, exact.results):
            for edit in some:
                if not _holds(model, example, [edit], exact.results):
                    edit.refuse(reason)


def _portions(model: nn.Module, edits: Sequence[Edit]) -> Iterator[list[Edit]]:
    """The edits, so many at a time that no more than a `PORTION` of memory, or an eighth of the model, is copied."""
    limit = max(PORTION, sum(p.nbytes for p in model.parameters()) // 8)
    some: list[Edit] = []
    size = 0
    for edit in edits:
        own = sum(p.nbytes for p in _touched(model, [edit]).values())
        if some and size + own > limit:
            yield some
            some, size = [], 0
        some.append(edit)
        size += own
    yield some


def _touched(model: nn.Module, edits: Iterable[Edit]) -> dict[str, nn.Parameter]:
    names = {name for edit in edits for name in edit.parameters}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in parameters if name in names or name.rpartition(".")[0] in names}


def _holds(model: nn.Module, example: Example, edits: Sequence[Edit], exact: dict[str, list[Tensor]]) -> bool:
    """Whether every product but the producers' own comes out as before; the model is put back."""
    ignored = {name for edit in edits for name in edit.producers}
    if not all(edit.attention for edit in edits):
        ignored.add(ACTIVATIONS)
    parameters = _touched(model, edits)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    handles: list[RemovableHandle | None] = []
    edited = _Comparer(model, {name: results for name, results in exact.items() if name not in ignored})
    try:
        handles.extend(edit.apply() for edit in edits)
        _run(model, example, edited)
    except ModelError:
        return False
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()
        with torch.no_grad():
            for name, values in kept.items():
                parameters[name].copy_(values)
    return edited.same()


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    tolerance = max(TOLERANCE, 8 * torch.finfo(a.dtype).eps)
    return bool((a.double() - b.double()).abs().max() <= tolerance * a.double().abs().max().clamp(min=1e-30))


class _Products(Watcher):
    """Shown the rows of every product: those with a parameter by the parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = Parameters(model)

    @abstractmethod
    def see(self, name: str, rows: Tensor) -> None:
        """A product's rows, at most `ROWS`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = operator_name(func)
        places = WITH_WEIGHT.get(name) or ((0, 1) if "convolution" in name else None)
        if places is not None:
            found = self.parameters.of(args[places[1]]) or self.parameters.of(args[places[0]])
            self.see(found[0] if found else ACTIVATIONS, _rows(out, 1 if "convolution" in name else -1))
        elif "scaled_dot_product" in name:
            query, key = args[0].detach(), args[1].detach()
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1) if query.dim() > 3 else key
            self.see(ACTIVATIONS, _rows(query @ key.transpose(-1, -2), -1))
        return out


class _Recorder(_Products):
    """Keeps the rows of all products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.results: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, name: str, rows: Tensor) -> None:
        self.results[name].append(rows)


class _Comparer(_Products):
    """Compares the rows of products with what they were, and keeps none."""

    def __init__(self, model: nn.Module, exact: dict[str, list[Tensor]]) -> None:
        super().__init__(model)
        self.exact = exact
        self.seen: dict[str, int] = defaultdict(int)
        self.close = True

    def see(self, name: str, rows: Tensor) -> None:
        if name in self.exact:
            before, place = self.exact[name], self.seen[name]
            self.close = self.close and place < len(before) and _close(before[place], rows)
            self.seen[name] += 1

    def same(self) -> bool:
        """Whether all were there and came out as before."""
        return self.close and all(self.seen[name] == len(before) for name, before in self.exact.items())


def _rows(product: Tensor, channels: int) -> Tensor:
    """At most `ROWS` rows of a product, evenly spread, each with all its channels."""
    rows = product.detach().movedim(channels, -1).flatten(0, -2)
    if len(rows) <= ROWS:
        return rows.clone()
    return rows[torch.linspace(0, len(rows) - 1, ROWS, device=rows.device).long()]


def _run(model: nn.Module, example: Example, watcher: _Products) -> None:
    with as_in_evaluation(model), watcher:
        call(model, example)
