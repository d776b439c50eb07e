"""Edits that leave a model's function as it is: channels are scaled, or put in another order, on both sides.

A new order is a permutation [size]: place i takes what stood at place `order[i]`, so that folding x gives `x[order]`.
Scaling is exact up to rounding, reordering up to the order in which sums are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core.errors import ModelError
from qsim_core.structure.channels import Use
from qsim_core.transforms.offload import editing

if TYPE_CHECKING:
    from qsim_core.structure.heads import Attention, Projection
    from qsim_core.structure.structure import NormGroup, WeightPair


def scale_group(model: nn.Module, group: NormGroup, factors: Tensor) -> None:
    """Divide a norm's channels by `factors` [size] and multiply the columns that read them; the function stays."""
    weight, *bias = _of_norm(model, group)
    wide = factors.double()
    with editing(model, weight, *bias) as parameters:
        shifted = parameters[weight].double() + group.offset
        parameters[weight].copy_(shifted / wide.to(shifted.device) - group.offset)
        for name in bias:
            parameters[name].copy_(parameters[name].double() / wide.to(shifted.device))
    _scale_uses(model, group.uses, wide)


def scale_pair(model: nn.Module, pair: WeightPair, factors: Tensor) -> None:
    """Divide the rows of the producer, and its biases, by `factors` [size], and multiply the columns that read them."""
    wide = factors.double()
    with editing(model, pair.producer, *pair.biases) as parameters:
        producer = parameters[pair.producer]
        producer.copy_(producer.double() / _facing(wide, producer, pair.axis))
        for name in pair.biases:
            parameters[name].copy_(parameters[name].double() / wide.to(producer.device))
    _scale_uses(model, pair.uses, wide)


def permute_group(model: nn.Module, group: NormGroup, order: Tensor) -> RemovableHandle:
    """Put a norm's channels, and the columns that read them, in another order; the function stays.

    The norm's input is the residual stream, whose order is everyone's: a hook gathers it on entry. The handle that is
    returned takes the hook away again, and leaves the parameters as they are.
    """
    with editing(model, *_of_norm(model, group)) as parameters:
        for parameter in parameters.values():
            parameter.copy_(parameter[order.to(parameter.device)])
    _permute_uses(model, group.uses, order)
    return model.get_submodule(group.norm).register_forward_pre_hook(Gather(order), with_kwargs=True)


def permute_rows(model: nn.Module, rows: WeightPair | Projection, order: Tensor) -> None:
    """Put the channels that a weight makes, with its partners' and all their biases, in another order, and the columns
    that read them. Where other products come between the two, as in attention, not every order leaves the function."""
    for maker in (rows, *rows.partners):
        with editing(model, maker.producer, *maker.biases) as parameters:
            for name, axis in ((maker.producer, maker.axis), *((bias, -1) for bias in maker.biases)):
                parameter = parameters[name]
                parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))
    _permute_uses(model, rows.uses, order)


def permute_scores(model: nn.Module, attention: Attention, places: Sequence[Tensor]) -> None:
    """Put the channels of q and k in another order within their heads, `places` [size of a head] for each head of k:
    q·k stays."""
    query, key = attention.query, attention.key
    assert query is not None and key is not None
    orders = {rows.producer: torch.arange(rows.size) for rows in (query, key)}
    for q, k, group in zip(query.heads, key.heads, key.shares, strict=True):
        orders[query.producer][q] = q[places[group]]
        orders[key.producer][k] = k[places[group]]
    for rows in {rows.producer: rows for rows in (query, key)}.values():
        permute_rows(model, rows, orders[rows.producer])


class Gather:
    """A norm's input in another order, on entry to the norm."""

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._gathered(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._gathered(kwargs[name])}

    def _gathered(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order.to(x.device))


def columns(use: Use, order: Tensor) -> Tensor:
    """The order of the columns of a weight that reads channels in the order `order`.

    Where a channel is read several times (once for each head of a group), its first reader becomes the first reader of
    the channel that takes its place, and so on. Columns that read none stay.
    """
    channels = use.channels.to(order.device)
    read = (channels >= 0).nonzero().flatten()
    readers = read[channels[read].argsort(stable=True)]
    counts = torch.bincount(channels[read], minlength=len(order))
    if not torch.equal(counts, counts[order]):
        raise ModelError(f"{use.weight} reads some channels more often than those that would take their places")
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(channels)
    place[readers] = torch.arange(len(readers), device=order.device) - starts.repeat_interleave(counts)
    result = torch.arange(len(channels), device=order.device)
    result[read] = readers[starts[order[channels[read]]] + place[read]]
    return result


def _of_norm(model: nn.Module, group: NormGroup) -> list[str]:
    """The names of a norm's parameters, its weight first."""
    names = [name for name, _ in model.get_submodule(group.norm).named_parameters(group.norm, recurse=False)]
    return sorted(names, key=lambda name: not name.endswith("weight"))


def _permute_uses(model: nn.Module, uses: Iterable[Use], order: Tensor) -> None:
    for use in uses:
        with editing(model, use.weight) as parameters:
            parameter = parameters[use.weight]
            parameter.copy_(parameter.index_select(use.axis, columns(use, order).to(parameter.device)))


def _scale_uses(model: nn.Module, uses: Iterable[Use], factors: Tensor) -> None:
    for use in uses:
        read = torch.where(use.channels >= 0, factors.cpu()[use.channels.clamp(min=0)], 1.0)
        with editing(model, use.weight) as parameters:
            parameter = parameters[use.weight]
            parameter.copy_(parameter.double() * _facing(read, parameter, use.axis))


def _facing(values: Tensor, parameter: Tensor, axis: int) -> Tensor:
    """Values along an axis of a parameter, shaped to be multiplied with it."""
    return values.to(parameter.device).view([-1 if place == axis else 1 for place in range(parameter.dim())])
