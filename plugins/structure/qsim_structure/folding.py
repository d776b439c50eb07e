"""Scale, reorder or rotate channels on both sides, where they are made and read: the model's function stays.

An order is a permutation [size]: the new x is `x[order]`. Scaling is exact up to rounding, reordering up to the order
in which sums are added.

Each function takes `editing`, a context manager that gives parameters by their names for changes in place. The default
is for parameters in memory. For weights that are kept elsewhere, as accelerate's offloading does, pass one that loads
them on entry and writes them back on exit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_structure.channels import Partner, Use
from qsim_structure.errors import StructureError

if TYPE_CHECKING:
    from qsim_structure.heads import Attention, Projection
    from qsim_structure.structure import NormGroup, WeightPair


class Editing(Protocol):
    """A context manager that gives parameters by their names, to be changed in place without gradients."""

    def __call__(self, model: nn.Module, *names: str) -> AbstractContextManager[Mapping[str, nn.Parameter]]: ...


@contextlib.contextmanager
def in_memory(model: nn.Module, *names: str) -> Iterator[Mapping[str, nn.Parameter]]:
    """Give parameters by their names. Raises `StructureError` for a parameter on the `meta` device."""
    parameters = {name: model.get_parameter(name) for name in names}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise StructureError(f"{name} is not in memory (it is on the meta device); pass `editing` to load it")
    with torch.no_grad():
        yield parameters


def scale_group(model: nn.Module, group: NormGroup, factors: Tensor, editing: Editing = in_memory) -> None:
    """Divide a norm's channels by `factors` [size] and multiply the columns that read them; the function stays."""
    scale_norm(model, group, factors, editing)
    _scale_uses(model, group.uses, factors.double(), editing)


def scale_norm(model: nn.Module, group: NormGroup, factors: Tensor, editing: Editing = in_memory) -> None:
    """Divide a norm's channels by `factors` [size]; what reads them gets other values."""
    weight, *bias = _of_norm(model, group)
    wide = factors.double()
    with editing(model, weight, *bias) as parameters:
        shifted = parameters[weight].double() + group.offset
        parameters[weight].copy_(shifted / wide.to(shifted.device) - group.offset)
        for name in bias:
            parameters[name].copy_(parameters[name].double() / wide.to(shifted.device))


class GroupScaling:
    """Scales a norm group by powers of two of 1 and more, and takes the factors away again without copies of weights.

    The columns that read the norm get their values back to the bit; the caller keeps the norm's own parameters.
    """

    def __init__(self, model: nn.Module, group: NormGroup, factors: Tensor) -> None:
        self.model, self.group, self.factors = model, group, factors
        self._scaled: list[Use] = []
        largest = float(factors.max())
        weights = {use.weight: model.get_parameter(use.weight) for use in group.uses}
        self.undone = frozenset(name for name, weight in weights.items() if _stays_finite(weight, largest))
        """The names of the weights of which no copy is needed."""

    def apply(self) -> None:
        """Scale the group."""
        scale_norm(self.model, self.group, self.factors)
        for use in self.group.uses:
            _scale_uses(self.model, [use], self.factors, in_memory)
            self._scaled.append(use)

    def undo(self) -> None:
        """Divide the columns that were scaled."""
        while self._scaled:
            _scale_uses(self.model, [self._scaled.pop()], 1 / self.factors, in_memory)


def _stays_finite(weight: Tensor, factor: float) -> bool:
    """Tell if no value of a weight overflows when it is multiplied; NaN and infinities stay what they are."""
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.is_meta:
        return False
    low, high = (float(x) for x in weight.detach().aminmax())
    return max(-low, high) * factor <= torch.finfo(weight.dtype).max


def scale_pair(model: nn.Module, pair: WeightPair, factors: Tensor, editing: Editing = in_memory) -> None:
    """Divide the rows of the producer, and its biases, by `factors` [size], and multiply the columns that read them."""
    wide = factors.double()
    with editing(model, pair.producer, *pair.biases) as parameters:
        producer = parameters[pair.producer]
        producer.copy_(producer.double() / _facing(wide, producer, pair.axis))
        for name in pair.biases:
            parameters[name].copy_(parameters[name].double() / wide.to(producer.device))
    _scale_uses(model, pair.uses, wide, editing)


def permute_group(model: nn.Module, group: NormGroup, order: Tensor, editing: Editing = in_memory) -> RemovableHandle:
    """Put a norm's channels, and the columns that read them, in another order; the function stays.

    The norm's input is the residual stream, which other modules read in the old order: a hook reorders it on entry to
    the norm. The handle that is returned removes the hook, and leaves the parameters as they are.
    """
    with editing(model, *_of_norm(model, group)) as parameters:
        for parameter in parameters.values():
            parameter.copy_(parameter[order.to(parameter.device)])
    _permute_uses(model, group.uses, order, editing)
    return model.get_submodule(group.norm).register_forward_pre_hook(Gather(order), with_kwargs=True)


def permute_rows(model: nn.Module, rows: WeightPair | Projection, order: Tensor, editing: Editing = in_memory) -> None:
    """Put the channels that a weight and its partners make, with their biases, and the columns that read them, in
    another order. Where other products come in between, as in attention, not every order leaves the function."""
    makers = [(rows, order), *((partner, order_beside(partner, order)) for partner in rows.partners)]
    for maker, own in makers:
        with editing(model, maker.producer, *maker.biases) as parameters:
            for name, axis in ((maker.producer, maker.axis), *((bias, -1) for bias in maker.biases)):
                parameter = parameters[name]
                parameter.copy_(parameter.index_select(axis, own.to(parameter.device)))
    _permute_uses(model, rows.uses, order, editing)


def permute_scores(
    model: nn.Module, attention: Attention, places: Sequence[Tensor], editing: Editing = in_memory
) -> None:
    """Put the channels of q and k in another order within their heads: q·k stays.

    `places` has an order [size of a head] for each head of k.
    """
    query, key = attention.query, attention.key
    assert query is not None and key is not None
    orders = {rows.producer: torch.arange(rows.size) for rows in (query, key)}
    for q, k, group in zip(query.heads, key.heads, key.shares, strict=True):
        orders[query.producer][q] = q[places[group]]
        orders[key.producer][k] = k[places[group]]
    for rows in {rows.producer: rows for rows in (query, key)}.values():
        permute_rows(model, rows, orders[rows.producer], editing)


def rotate_values(
    model: nn.Module, value: Projection, rotation: Callable[[Tensor], Tensor], editing: Editing = in_memory
) -> None:
    """Rotate the channels of each head of v, with their biases, and the columns that read them.

    `rotation` is an orthogonal map along the last axis, x -> x R. The function stays if all between is linear: the
    probabilities, views and copies. Raises `StructureError` if a weight reads the channels of a head in another order.
    """
    size = value.heads.shape[-1]
    heads = {tuple(head.tolist()) for head in value.heads}
    for use in value.uses:
        read = use.channels.tolist()
        if len(read) % size or any(tuple(read[i : i + size]) not in heads for i in range(0, len(read), size)):
            raise StructureError(f"{use.weight} does not read the channels of each head in their order")
    for name, axis in ((value.producer, value.axis), *((bias, -1) for bias in value.biases)):
        with editing(model, name) as parameters:
            parameters[name].copy_(rotated_rows(parameters[name].double(), axis, value.distinct, rotation))
    for use in value.uses:
        with editing(model, use.weight) as parameters:
            parameters[use.weight].copy_(rotated_columns(parameters[use.weight].double(), use.axis, size, rotation))


def rotated_rows(tensor: Tensor, axis: int, heads: Iterable[Tensor], rotation: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute a weight or bias whose channels along `axis` are rotated within each head."""
    rows = tensor.movedim(axis, -1).clone()
    for head in heads:
        rows[..., head.to(rows.device)] = rotation(rows[..., head.to(rows.device)])
    return rows.movedim(-1, axis)


def rotated_columns(tensor: Tensor, axis: int, size: int, rotation: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute a weight that reads rotated channels along `axis`, a head of `size` after another."""
    columns = tensor.movedim(axis, -1).unflatten(-1, (-1, size))
    return rotation(columns).flatten(-2).movedim(-1, axis)


class Gather:
    """A hook that puts a norm's input in another order."""

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._gathered(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._gathered(kwargs[name])}

    def _gathered(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.order):
            raise StructureError(f"the norm's input has {x.shape[-1]} channels on its last axis, not {len(self.order)}")
        return x.index_select(-1, self.order.to(x.device))


def columns(use: Use, order: Tensor) -> Tensor:
    """Find the order of the columns of a weight for channels in the order `order`.

    Several columns may read one channel, such as one for each head of a group. Then its first reader becomes the first
    reader of the channel that takes its place, and so on. Columns that read no channel stay.
    """
    channels = use.channels.to(order.device)
    read = (channels >= 0).nonzero().flatten()
    readers = read[channels[read].argsort(stable=True)]
    counts = torch.bincount(channels[read], minlength=len(order))
    if not torch.equal(counts, counts[order]):
        raise StructureError(f"{use.weight} reads some channels more often than those that would take their places")
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(channels)
    place[readers] = torch.arange(len(readers), device=order.device) - starts.repeat_interleave(counts)
    result = torch.arange(len(channels), device=order.device)
    result[read] = readers[starts[order[channels[read]]] + place[read]]
    return result


def order_beside(partner: Partner, order: Tensor) -> Tensor:
    """Find the order of a partner's channels, for channels in the order `order` that are multiplied with them.

    One channel of the others may meet several of the partner's, as a value that several heads share meets their gates.
    """
    read, moved = partner.own.channels, columns(partner.other, order)
    result, reads = torch.arange(partner.size), read >= 0
    result[read[reads]] = read[moved][reads]
    if not torch.equal(result[read.clamp(min=0)].where(reads, read), read[moved]):
        raise StructureError(f"{partner.producer} makes other channels for each of those that they are multiplied with")
    return result


def _of_norm(model: nn.Module, group: NormGroup) -> list[str]:
    """List the names of a norm's parameters, its weight first."""
    names = [name for name, _ in model.get_submodule(group.norm).named_parameters(group.norm, recurse=False)]
    return sorted(names, key=lambda name: not name.endswith("weight"))


def _permute_uses(model: nn.Module, uses: Iterable[Use], order: Tensor, editing: Editing) -> None:
    for use in uses:
        with editing(model, use.weight) as parameters:
            parameter = parameters[use.weight]
            parameter.copy_(parameter.index_select(use.axis, columns(use, order).to(parameter.device)))


def _scale_uses(model: nn.Module, uses: Iterable[Use], factors: Tensor, editing: Editing) -> None:
    for use in uses:
        read = torch.where(use.channels >= 0, factors.cpu()[use.channels.clamp(min=0)], 1.0)
        with editing(model, use.weight) as parameters:
            parameter = parameters[use.weight]
            facing = _facing(read, parameter, use.axis)
            if torch.equal(read.to(parameter.dtype).double(), read):  # then both ways round once, alike
                parameter.mul_(facing.to(parameter.dtype))
            else:
                parameter.copy_(parameter.double() * facing)


def _facing(values: Tensor, parameter: Tensor, axis: int) -> Tensor:
    """Shape values along an axis of a parameter so that they broadcast with it."""
    return values.to(parameter.device).view([-1 if place == axis else 1 for place in range(parameter.dim())])
