"""Clusters of like channels: the extremes of every channel, and k-means on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.rounding import working
from qsim_core.matmuls.call import Call
from qsim_core.quantizers.observers import Extremes, MovingExtremes, Observer
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_rptq.held import Clustered
from qsim_rptq.steps import Maker, Place, Step


def fold(context: Context, step: Step, low: Tensor, high: Tensor) -> None:
    """Put a step's channels in the order of their clusters, by their extremes [features, size]."""
    order, labels = ordered(low.view(len(low), step.sets, -1), high.view(len(high), step.sets, -1), step.clusters)
    step.fold(order)
    step.labels = labels.flatten()


def ordered(low: Tensor, high: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The order of each set's channels by cluster, and the clusters in that order, numbered through all sets.

    low, high [features, sets, channels] -> [sets, channels] each. k-means is scikit-learn's, on (high, low) of all
    features, in float64, with `n_init=10, random_state=0`; there are never more clusters than different channels.
    """
    import numpy as np
    from sklearn.cluster import KMeans

    points = torch.cat([high, low]).permute(1, 2, 0).double().cpu().numpy()
    orders, labels, number = [], [], 0
    for of_set in points:
        count = min(clusters, len(np.unique(of_set, axis=0)))
        found = torch.from_numpy(KMeans(count, n_init=10, random_state=0).fit(of_set).labels_).long()
        order = found.argsort(stable=True)
        orders.append(order)
        labels.append(found[order] + number)
        number += count
    return torch.stack(orders), torch.stack(labels)


def channel_extremes(context: Context, steps: Sequence[Step]) -> dict[Step, tuple[Tensor, Tensor]]:
    """The lowest and the highest value of each slot in all the data, [features, size] each; q and k are two features.

    A step that no value reaches is left out.
    """
    wanted = {part: (step.size, part.slots) for step in steps for part in step.features or step.places}
    seen = extremes(context, wanted, None)
    found = {}
    for step in steps:
        reached = [seen[part] for part in step.features or step.places if part in seen]
        if not reached:
            continue
        low, high = (torch.stack(ends) for ends in zip(*reached, strict=True))
        apart = any(isinstance(part, Maker) for part in step.features)
        found[step] = (low, high) if apart else (low.amin(0, keepdim=True), high.amax(0, keepdim=True))
    return found


def cluster_extremes(
    context: Context, steps: Sequence[Step], momentum: float | None
) -> dict[Place, tuple[Tensor, Tensor, Tensor]]:
    """The lowest and the highest value of each cluster at each place, averaged over batches or of all data; and, in the
    shape of its channels, which cluster each channel is of.

    A place that no value reached (an expert that was never chosen) has the ranges of all others of its step.
    """
    groups = {place: step.labels[place.slots] for step in steps for place in step.places}
    counts = {place: int(step.labels.max()) + 1 for step in steps for place in step.places}
    seen = extremes(context, {place: (counts[place], groups[place]) for place in groups}, momentum)
    found: dict[Place, tuple[Tensor, Tensor, Tensor]] = {}
    for step in steps:
        reached = [seen[place] for place in step.places if place in seen]
        low, high = (torch.stack(ends) for ends in zip(*reached, strict=True))
        union = low.amin(0), high.amax(0)
        found |= {place: (*seen.get(place, union), groups[place]) for place in step.places}
    return found


def relative_errors(
    context: Context, steps: Sequence[Step], scales: Mapping[Place, Sequence[Clustered]]
) -> dict[Step, list[float]]:
    """|x - quantized x| / |x| over all operands of each step in the first batch, for each way to quantize them."""
    at: dict[str, list[tuple[Step, Place]]] = defaultdict(list)
    for step in steps:
        for place in step.places:
            at[place.site.name].append((step, place))
    power: dict[Step, float] = defaultdict(float)
    errors: dict[Step, list[float]] = {step: [0.0] * len(scales[step.places[0]]) for step in steps}

    def watch(site: Site, matmul: Call) -> None:
        for step, place in at.get(site.name, ()):
            x = place.values(matmul)
            power[step] += float(x.double().square().sum())
            for way, held in enumerate(scales[place]):
                errors[step][way] += float((held.quantize(x) - x).double().square().sum())

    with context.watching(watch, 0), as_in_evaluation(context.model):
        call(context.model, context.batches[0])
    return {step: [(e / power[step]) ** 0.5 if power[step] else 0.0 for e in errors[step]] for step in steps}


def extremes(
    context: Context, wanted: Mapping[Any, tuple[int, Tensor]], momentum: float | None
) -> dict[Any, tuple[Tensor, Tensor]]:
    """The lowest and the highest value in each group of channels, for places and makers that were reached.

    `wanted` says how many groups there are and, in the shape of the channels, which is whose. With a momentum, new =
    momentum * old + (1 - momentum) * batch, starting at the first batch (reference: 0.99). All calls of a matmul in one
    batch count together: a model may take its tokens one by one.
    """
    at: dict[str, list[Any]] = defaultdict(list)
    for part in wanted:
        at[part.site.name].append(part)
    observers: dict[Any, Observer] = {}

    def watch(site: Site, matmul: Call) -> None:
        for part in at.get(site.name, ()):
            count, groups = wanted[part]
            values = part.values(matmul)
            if len(values):
                observer = observers.setdefault(part, Extremes() if momentum is None else MovingExtremes(momentum))
                observer.update(_ends(values, count, groups))

    for index, batch in enumerate(context.run.track(context.batches, len(context.batches), "rptq")):
        with context.watching(watch, index), as_in_evaluation(context.model):
            call(context.model, batch)
        for observer in observers.values():
            observer.next_batch()
    ends = {part: observer.values()[0] for part, observer in observers.items()}
    return {part: (low_high[:, 0], low_high[:, 1]) for part, low_high in ends.items()}


def _ends(values: Tensor, count: int, groups: Tensor) -> Tensor:
    """[count, 2]: the lowest and the highest of values [n, *channels] in each group of channels."""
    by_channel = working(values.flatten(1))
    index = groups.flatten().to(values.device)
    low = by_channel.new_full((count,), torch.inf).scatter_reduce(0, index, by_channel.amin(0), "amin")
    high = by_channel.new_full((count,), -torch.inf).scatter_reduce(0, index, by_channel.amax(0), "amax")
    return torch.stack([low, high], -1)
