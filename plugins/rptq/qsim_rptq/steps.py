"""Steps of reordering: channels that are made in one place and read in others, and the fold of a new order.

A step's *slots* are its channels, [sets, channels of a set]: one set for a norm or a pair of weights, one for each head
inside attention. Only slots of one set change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from qsim_structure import Attention, NormGroup, Projection, Use, WeightPair
from qsim_structure.for_transforms import permute_group, permute_rows, permute_scores, structure_of
from torch import Tensor

from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context


@dataclass(eq=False)
class Place:
    """An operand of a matmul, and the slot of each of its channels."""

    site: Site
    role: str
    slots: Tensor
    """[K], or [heads, size of a head] for an operand of attention."""
    tokens_last: bool = False
    """True for v in PV if its quantizer has the tokens, the reduction axis, last."""

    def values(self, call: Call) -> Tensor:
        """Give the operand as [values, K] or [values, heads, size of a head]."""
        if self.slots.dim() == 1:
            return call.input.reshape(-1, len(self.slots))
        index = int(self.role == "input2")
        rows = call.layouts[index].rows(call.operands[index].detach())
        rows = rows.transpose(-1, -2) if self.site.is_value_product else rows
        rows = rows if rows.dim() > 3 else rows.unflatten(0, (-1, len(self.slots)))
        return rows.transpose(-2, -3).flatten(0, -3)

    def facing(self, by_channel: Tensor) -> Tensor:
        """Shape numbers, one for each channel, so that they broadcast with the rows that a quantizer is given."""
        if self.slots.dim() == 1:
            return by_channel
        return by_channel.unsqueeze(-1 if self.tokens_last else -2)


@dataclass(eq=False)
class Maker:
    """A weight whose results are measured instead of the operands that read them: that of q or k."""

    site: Site
    channels: Tensor
    """[heads, size of a head]"""
    slots: Tensor

    def values(self, call: Call) -> Tensor:
        """Give the weight's result as [values, heads, size of a head]."""
        result = call.result.rows(call.run([operand.detach() for operand in call.operands]))
        return result.reshape(-1, result.shape[-1])[:, self.channels]


@dataclass(eq=False)
class Step:
    """Channels that are put in another order, the places where they are quantized, and the places that are measured."""

    name: str
    sets: int
    size: int
    """The number of channels in all sets together."""
    clusters: int
    """The number of clusters of each set, at most."""
    places: list[Place]
    fold: Callable[[Tensor], None]
    """Folds an order for each set, [sets, channels of a set]."""
    features: Sequence[Place | Maker] = ()
    """The operands and weights whose extremes are clustered; empty: the places."""
    of_norm: bool = False
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    """[size]: the cluster of each slot, once they are in order."""


def steps(context: Context, clusters: int, head_clusters: int, only_kv: bool) -> Iterator[Step]:
    """Give the steps for all channels that the recipe quantizes; those that cannot be reordered are reported."""
    if not only_kv:
        for refused in structure_of(context).refused:
            context.report(refused.name.removesuffix(".weight"), note=f"left in order: {'; '.join(refused.reasons)}")
        yield from _norms(context, clusters)
        yield from _pairs(context, clusters)
    for attention in structure_of(context).attention:
        yield from _scores(context, attention, head_clusters, only_kv)
        yield from _values(context, attention, head_clusters, only_kv)


def _norms(context: Context, clusters: int) -> Iterator[Step]:
    """Give the steps R1 and R4: from norms to the weights that read them."""

    def fold(group: NormGroup, order: Tensor) -> None:
        context.handles.append(permute_group(context.model, group, order[0]))

    for group in structure_of(context).groups:
        places = _readers(context, group.uses, torch.arange(group.size))
        if places and _free(context, group.norm, group.norm):
            yield Step(group.norm, 1, group.size, clusters, places, partial(fold, group), of_norm=True)


def _pairs(context: Context, clusters: int) -> Iterator[Step]:
    """Give the steps R5: from one weight to another, fc1 to fc2; gate and up together."""

    def fold(pair: WeightPair, order: Tensor) -> None:
        permute_rows(context.model, pair, order[0])

    done = {attention.value.producer for attention in structure_of(context).attention}
    for pair in structure_of(context).pairs:
        if pair.producer in done:
            continue
        done |= {pair.producer, *(partner.producer for partner in pair.partners)}
        places = _readers(context, pair.uses, torch.arange(pair.size))
        name = pair.producer.removesuffix(".weight")
        if places and _free(context, pair.producer, name):
            yield Step(name, 1, pair.size, clusters, places, partial(fold, pair))


def _scores(context: Context, attention: Attention, clusters: int, only_kv: bool) -> Iterator[Step]:
    """Give the steps R2: q and k, head by head, in one order."""
    query, key = attention.query, attention.key
    roles = ("input2",) if only_kv else ("input", "input2")
    sites = _products(context, f"{attention.path}:qk", roles)
    if not sites or not _free(context, f"{attention.path}:qk", f"{attention.path}:qk"):
        return
    assert query is not None and key is not None
    slots = _slots(key)
    made_at = {site.weight: site for site in context.sites.table.values()}
    yield Step(
        f"{attention.path}:qk",
        len(key.distinct),
        len(key.distinct) * key.heads.shape[-1],
        clusters,
        [Place(site, role, slots) for site, role in sites],
        partial(permute_scores, context.model, attention),
        [Maker(made_at[rows.producer], rows.heads, slots) for rows in (query, key)],
    )


def _values(context: Context, attention: Attention, clusters: int, only_kv: bool) -> Iterator[Step]:
    """Give the steps R3: v and the weights that read it behind the product, head by head."""
    value, name = attention.value, f"{attention.path}:pv"
    slots = _slots(value)
    tokens_last = all(site.plan.value_axis == "tokens" for site in context.all_sites)
    places = [Place(site, role, slots, tokens_last) for site, role in _products(context, name, ("input2",))]
    slot_of = torch.full((value.size,), -1)
    slot_of[value.heads] = slots
    readers = _readers(context, value.uses, slot_of)

    def fold(order: Tensor) -> None:
        channels = torch.arange(value.size)
        for head, places in zip(value.distinct, order, strict=True):
            channels[head] = head[places]
        permute_rows(context.model, value, channels)

    if (places or (readers and not only_kv)) and _free(context, name, name):
        sets = len(value.distinct)
        yield Step(
            name, sets, sets * attention.head_size, clusters, places + ([] if only_kv else readers), fold, readers
        )


def _slots(rows: Projection) -> Tensor:
    """[heads, size of a head]: the slots of each head; heads that share keys or values have the same."""
    size = rows.heads.shape[-1]
    return torch.tensor(rows.shares).unsqueeze(-1) * size + torch.arange(size)


def _readers(context: Context, uses: Iterable[Use], slot_of: Tensor) -> list[Place]:
    """Give the places where weights read channels and a quantizer stands; `slot_of` [channels] has their slots."""
    sites = {site.weight: site for site in context.sites.table.values()}
    found = []
    for use in uses:
        site = sites.get(use.weight)
        if site is None or site.planned("input") is None:
            continue
        if bool((use.channels < 0).any()):
            context.report(site.name, note="left in order: it reads constants too")
        else:
            found.append(Place(site, "input", slot_of[use.channels.cpu()]))
    return found


def _products(context: Context, alias: str, roles: Iterable[str]) -> list[tuple[Site, str]]:
    """Give the operands of a product of attention that are quantized."""
    sites = [site for site in context.sites.table.values() if alias in site.aliases]
    return [(site, role) for site in sites for role in roles if site.planned(role) is not None]


def _free(context: Context, name: str, layer: str) -> bool:
    """Tell if channels may be put in another order; if not, report why."""
    reasons = structure_of(context).why_ordered(name)
    if reasons:
        context.report(layer, note=f"left in order: {reasons}")
    return not reasons
