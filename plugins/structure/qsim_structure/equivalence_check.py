"""Try edits of a model and refuse those after which a product of the model differs.

The outputs alone may not show a wrong edit: the logits of a tiny model hardly depend on its attention. So each product
with a weight is compared, and for edits inside attention each product of two activations too.
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

from qsim_structure.channels import WITH_WEIGHT
from qsim_structure.operator_watcher import OperatorWatcher, operator_name, run_watched
from qsim_structure.parameter_addresses import ParameterAddresses

TOLERANCE = 2e-4
"""The largest difference, relative to the largest value of a product, or 8 ε of the dtype if that is more.

A wrong edit changes a product by 14% and more.
"""
KEPT_ROWS = 16
"""The number of rows of each product that are kept, evenly spread. An edit changes a channel in every row."""
COPIED_BYTES = 2**26
"""The bytes of weights that are copied at a time, by default: this, or an eighth of the model if that is more."""
ACTIVATIONS = ""
"""The name of the products of two activations; other products have the name of their weight."""

Run = Callable[[], Any]
"""A function that runs one example through the model."""


@dataclass(frozen=True)
class Edit:
    """A change of a model that should leave its function as it is."""

    apply: Callable[[], RemovableHandle | None]
    parameters: frozenset[str]
    """The names of the parameters that it changes, or of modules whose parameters all may change."""
    producers: frozenset[str]
    """The weights whose own products change, because their channels are scaled or in another order."""
    refuse: Callable[[str], None]
    """Called with the reason if another product changes."""
    attention: bool = False
    """True if it must not change products of two activations either."""
    undo: Callable[[], None] = lambda: None
    """Gives the parameters in `undone` their values back, to the bit, also after `apply` has failed halfway."""
    undone: frozenset[str] = frozenset()
    """The names of parameters that need no copy."""


def refuse_changed_products(
    model: nn.Module,
    run: Run,
    edits: Sequence[Edit],
    reason: str,
    copied_bytes: int | None = None,
    exact: Recorder | None = None,
) -> None:
    """Try many edits at once; where a product changes, try halves of them, and refuse each edit that changes one.

    `copied_bytes` limits the weights that are copied at a time. `exact` has seen a run without edits; by default one
    is made.
    """
    if not edits:
        return
    if exact is None:
        exact = Recorder(model)
        run_watched(model, run, exact)
    if copied_bytes is None:
        copied_bytes = max(COPIED_BYTES, sum(p.nbytes for p in model.parameters()) // 8)
    waiting = [*_portions(model, edits, copied_bytes)][::-1]
    while waiting:
        portion = waiting.pop()
        if change := _change(model, run, portion, exact.results, reason):
            if len(portion) == 1:
                portion[0].refuse(change)
            else:
                half = len(portion) // 2
                waiting += [portion[half:], portion[:half]]


def _portions(model: nn.Module, edits: Sequence[Edit], limit: int) -> Iterator[list[Edit]]:
    """Split edits into portions that change no more than `limit` bytes of weights, or one edit each."""
    portion: list[Edit] = []
    size = 0
    for edit in edits:
        own = sum(p.nbytes for p in _copied(model, [edit]).values())
        if portion and size + own > limit:
            yield portion
            portion, size = [], 0
        portion.append(edit)
        size += own
    yield portion


def _copied(model: nn.Module, edits: Iterable[Edit]) -> dict[str, nn.Parameter]:
    """Return the parameters that edits may change and do not give back themselves, by name."""
    names = {name for edit in edits for name in edit.parameters - edit.undone}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in parameters if name in names or name.rpartition(".")[0] in names}


def _change(model: nn.Module, run: Run, edits: Sequence[Edit], exact: dict[str, list[Tensor]], reason: str) -> str:
    """Return `reason` if a product, except the producers' own, changes under edits, or the error that they lead to.

    The text is empty if all products stay the same. The model is restored.
    """
    ignored = {name for edit in edits for name in edit.producers}
    if not all(edit.attention for edit in edits):
        ignored.add(ACTIVATIONS)
    parameters = _copied(model, edits)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    handles: list[RemovableHandle | None] = []
    edited = _Comparer(model, {name: results for name, results in exact.items() if name not in ignored})
    try:
        handles.extend(edit.apply() for edit in edits)
        run_watched(model, run, edited)
    except _AllSeen:
        pass
    except Exception as error:  # of the edit, or of the edited model
        return str(error).partition("\n")[0] or type(error).__name__
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()
        with torch.no_grad():
            for edit in edits:
                edit.undo()
            for name, values in kept.items():
                parameters[name].copy_(values)
    return "" if edited.same() else reason


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    tolerance = max(TOLERANCE, 8 * torch.finfo(a.dtype).eps) if a.is_floating_point() else 0.0
    return bool((a.double() - b.double()).abs().max() <= tolerance * a.double().abs().max().clamp(min=1e-30))


class _AllSeen(Exception):
    """Ends a run of which nothing more is compared. torch calls hooks at the end of modules for an `Exception`."""


class _ProductWatcher(OperatorWatcher):
    """Pass the rows of every product to `see`, with the name of its weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = ParameterAddresses(model)

    @abstractmethod
    def see(self, name: str, rows: Callable[[], Tensor]) -> None:
        """Take the rows of a product, at most `KEPT_ROWS`."""

    def is_last(self, name: str) -> bool:
        """Tell if nothing is to be seen after a product."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator_name(func)
        places = WITH_WEIGHT.get(name) or ((0, 1) if "convolution" in name else None)
        attention = "scaled_dot_product" in name
        if places is None and not attention:
            return func(*args, **(kwargs or {}))
        found = None if places is None else self.parameters.of(args[places[1]]) or self.parameters.of(args[places[0]])
        weight = found[0] if found else ACTIVATIONS
        if last := self.is_last(weight):
            args = _fewer(name, args)
        out = func(*args, **(kwargs or {}))
        self.see(weight, lambda: _scores(*args[:2]) if attention else _rows(out, 1 if "convolution" in name else -1))
        if last:
            raise _AllSeen
        return out


class Recorder(_ProductWatcher):
    """Keep the rows of all products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.results: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, name: str, rows: Callable[[], Tensor]) -> None:
        self.results[name].append(rows())


class _Comparer(_ProductWatcher):
    """Compare the rows of products with recorded ones, without keeping them."""

    def __init__(self, model: nn.Module, exact: dict[str, list[Tensor]]) -> None:
        super().__init__(model)
        self.exact = exact
        self.seen: dict[str, int] = defaultdict(int)
        self.close = True
        self.unseen = sum(map(len, exact.values()))

    def see(self, name: str, rows: Callable[[], Tensor]) -> None:
        if name in self.exact:
            before, place = self.exact[name], self.seen[name]
            self.close = self.close and place < len(before) and _close(before[place], rows())
            self.seen[name] += 1
            self.unseen -= 1

    def is_last(self, name: str) -> bool:
        return self.unseen == 1 and self.seen[name] == len(self.exact.get(name, ())) - 1

    def same(self) -> bool:
        """Tell if all recorded products were computed again, with the same rows."""
        return self.close and all(self.seen[name] == len(before) for name, before in self.exact.items())


def _rows(product: Tensor, channels: int) -> Tensor:
    """Take at most `KEPT_ROWS` rows of a product, evenly spread, each with all its channels."""
    dense = product.detach() if product.layout == torch.strided else product.detach().to_dense()
    rows: Tensor = torch.atleast_2d(dense.movedim(channels, -1)).flatten(0, -2)
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(-2)
    return rows.clone() if len(rows) <= KEPT_ROWS else rows[_spread(len(rows), rows.device)]


def _spread(rows: int, device: torch.device) -> Tensor:
    """Give the places of the rows that are kept."""
    return torch.linspace(0, rows - 1, KEPT_ROWS, device=device).long()


def _fewer(name: str, args: Any) -> Any:
    """Give a product of two matrices fewer rows, those that `_rows` would keep of its result; leave any other."""
    left, bias = {"mm": (0, None), "addmm": (1, 0)}.get(name, (None, None))
    if left is None or args[left].layout != torch.strided or len(args[left]) <= KEPT_ROWS:
        return args
    if bias is not None and args[bias].dim() > 1:
        return args
    rows = args[left][_spread(len(args[left]), args[left].device)]
    return (*args[:left], rows, *args[left + 1 :])


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Compute the rows of q kᵀ [..., heads, tokens, tokens] that `_rows` would keep; heads may share keys."""
    query, key = query.detach(), key.detach()
    count = query.shape[:-1].numel()
    if query.dim() > 3:
        shared = query.shape[1] // key.shape[1]
        if count <= KEPT_ROWS:
            key = key.repeat_interleave(shared, 1)
    else:
        shared = 1
    if count <= KEPT_ROWS:
        return _rows(query @ key.transpose(-1, -2), -1)
    *places, token = torch.unravel_index(_spread(count, query.device), query.shape[:-1])
    of_key = [place // shared if axis == 1 else place for axis, place in enumerate(places)]
    rows: Tensor = torch.linalg.vecdot(query[(*places, token)].unsqueeze(1), key[tuple(of_key)])
    return rows
