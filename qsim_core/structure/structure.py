"""What a model looks like: norms and the weights that read them, pairs of weights, attention.

Tracing proposes: `trace` runs one example and finds who makes channels and who reads them. A numeric check disposes:
all that is to be folded is folded with random factors and in random orders, and every product must come out as
before. What does not hold is refused, with the reason, and never folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.errors import ModelError
from qsim_core.structure.channels import Rows, Source, Use
from qsim_core.structure.equivalence_check import Edit, dispose
from qsim_core.structure.folding import permute_group, permute_rows, permute_scores, scale_group, scale_pair
from qsim_core.structure.heads import Attention, Projection, attention_in
from qsim_core.structure.tracing import Tracer
from qsim_core.transforms.forward import Example, as_in_evaluation, call


@dataclass(frozen=True)
class NormGroup:
    """A norm, and all the weights that read its output: a factor on a channel can be moved from one to the others."""

    norm: str
    """Path of the norm's module."""
    size: int
    uses: tuple[Use, ...]
    offset: float
    """0 where the norm multiplies by its weight, 1 where it does by one more than its weight (Gemma)."""

    @property
    def weights(self) -> list[str]:
        """The reading weights' names, each once, in the order in which they are read."""
        return list(dict.fromkeys(use.weight for use in self.uses))


@dataclass(frozen=True)
class WeightPair(Rows):
    """A weight whose rows are another's columns: channels may be permuted, and scaled where `scales`."""

    size: int
    uses: tuple[Use, ...]
    scales: bool
    partners: tuple[Rows, ...] = ()
    """Weights whose channels are multiplied with these on the way (gate and up): they are permuted together."""

    @property
    def weights(self) -> list[str]:
        return list(dict.fromkeys(use.weight for use in self.uses))


@dataclass(frozen=True)
class Refused:
    """What was found and may not be folded, and why."""

    name: str
    reasons: tuple[str, ...]


@dataclass
class Structure:
    """What was found in one model."""

    groups: list[NormGroup] = field(default_factory=list)
    pairs: list[WeightPair] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    ordered: list[Refused] = field(default_factory=list)
    """Whose channels have to stay in their order, and why: norms, producers, and for orders within heads `path:qk` (q
    with k) and `path:pv` (v)."""

    def why_ordered(self, name: str) -> str:
        """Why the order of these channels may not be changed; empty where it may."""
        return "; ".join(reason for refused in self.ordered if refused.name == name for reason in refused.reasons)

    def group_of(self, weight: str) -> NormGroup | None:
        """The norm group that a weight reads from."""
        return next((group for group in self.groups if weight in group.weights), None)


def trace(model: nn.Module, example: Example, declared: Mapping[str, Sequence[str]] | None = None) -> Structure:
    """Run the example once and say what was found; then check numerically what is to be folded.

    `declared` says for norms, by module path, which weights read them, and stands in place of what tracing finds; it is
    checked all the same. Raises `ModelError` if it names what the model has not.
    """
    with as_in_evaluation(model):
        tracer = Tracer(model).run(lambda: call(model, example))
    structure = Structure()
    if declared is not None:
        _declare(model, tracer, declared)
    for source in tracer.sources.values():
        reasons = [*source.refusals, *_conflicts(source, tracer)]
        found = _norm_group(model, source, reasons) if source.kind == "norm" else _pair(source, reasons, tracer)
        if isinstance(found, NormGroup):
            structure.groups.append(found)
        elif isinstance(found, WeightPair):
            structure.pairs.append(found)
        elif found is not None:
            structure.refused.append(found)
    structure.attention = attention_in(tracer)
    _check(model, example, structure)
    return structure


def _declare(model: nn.Module, tracer: Tracer, declared: Mapping[str, Sequence[str]]) -> None:
    """Put a declaration in place of the norms that were found: each weight reads all channels in their order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for norm, weights in declared.items():
        source = tracer.sources.get(("norm", norm))
        if source is None:
            raise ModelError(f"{norm!r} is declared as a norm, and the model runs none of that name")
        source.refusals.clear()
        source.uses.clear()
        for name in weights:
            if name not in parameters:
                raise ModelError(f"{norm!r} is declared to be read by {name!r}, which is no parameter of the model")
            axes = [axis for axis, size in enumerate(parameters[name].shape) if size == source.size]
            if not axes:
                raise ModelError(f"{name!r} is declared to read the {source.size} channels of {norm!r}; no axis fits")
            channels = torch.arange(source.size)
            source.uses += [Use(name, axes[-1], channels, True, event) for event in tracer.events[name] or {0}]


def _conflicts(source: Source, tracer: Tracer) -> list[str]:
    """Why the weights that read a source may not be changed for its sake."""
    reasons = []
    for name in dict.fromkeys(use.weight for use in source.uses):
        first, *more = [use for use in source.uses if use.weight == name]
        if tracer.readers[name]:
            reasons.append(f"{name} is also read by {', '.join(sorted(tracer.readers[name]))}: it is tied")
        if tracer.events[name] - {first.event, *(use.event for use in more)}:
            reasons.append(f"{name} also reads other inputs")
        if any(use.axis != first.axis or not torch.equal(use.channels, first.channels) for use in more):
            reasons.append(f"{name} reads its channels in two orders")
    return reasons


def _norm_group(model: nn.Module, source: Source, reasons: Sequence[str]) -> NormGroup | Refused:
    module = model.get_submodule(source.name)
    found = list(reasons)
    if not source.uses:
        found.append("no weight reads it directly")
    elif not all(use.scales for use in source.uses):
        found.append("a curve lies between it and a weight")
    weight = getattr(module, "weight", None)
    offset = None
    if not isinstance(weight, nn.Parameter):
        found.append("it has no weight to fold into")
    elif weight.shape != (source.size,):
        found.append("its weight is not one number for each channel")
    elif not found:
        offset = _offset(module, source.arguments)
        if offset is None:
            found.append("its weight is not a factor of its output")
    if found or offset is None:
        return Refused(source.name, tuple(dict.fromkeys(found)))
    return NormGroup(source.name, source.size, _unique(source.uses), offset)


def _pair(source: Source, reasons: Sequence[str], tracer: Tracer) -> WeightPair | Refused | None:
    if not source.uses:
        return None
    if reasons:
        return Refused(source.name, tuple(dict.fromkeys(reasons)))
    scales = all(use.scales for use in source.uses)
    events = {use.event for use in source.uses}
    others = [s for s in tracer.sources.values() if s is not source and events & {use.event for use in s.uses}]
    partners = tuple(Rows(s.name, s.axis, tuple(s.biases)) for s in others if s.kind == "linear")
    return WeightPair(
        source.name, source.axis, tuple(source.biases), source.size, _unique(source.uses), scales, partners
    )


def _unique(uses: Sequence[Use]) -> tuple[Use, ...]:
    return tuple({(use.weight, use.axis): use for use in uses}.values())


def _offset(module: nn.Module, arguments: tuple[Any, ...]) -> float | None:
    """o where the norm's output is (weight + o) f(x) + bias, found by running it; None where it is not of that form."""
    weight, bias = module.weight, getattr(module, "bias", None)
    kept = {p: p.detach().clone() for p in (weight, bias) if isinstance(p, nn.Parameter)}
    outputs = []
    with torch.no_grad():
        try:
            if isinstance(bias, nn.Parameter):
                bias.zero_()
            for value in (0.0, 1.0, 2.0):
                weight.fill_(value)  # type: ignore[operator]
                outputs.append(module(*arguments).double())
        finally:
            for parameter, values in kept.items():
                parameter.copy_(values)
    zero, one, two = outputs
    slope = one - zero
    if not bool(slope.abs().max() > 0) or (two - one - slope).abs().max() > 1e-4 * slope.abs().max():
        return None
    place = slope.abs().argmax()
    return round(float(zero.flatten()[place] / slope.flatten()[place]), 2)


def _check(model: nn.Module, example: Example, structure: Structure) -> None:
    """Fold everything with random factors, then with random orders; what changes a product is refused."""
    generator = torch.Generator().manual_seed(0)
    reason = "a product of the model changes when it is folded"

    def factors(size: int) -> Tensor:
        return torch.exp2(torch.randint(-1, 2, (size,), generator=generator).double())  # exact in any precision

    edits = [
        Edit(partial(scale_group, model, g, factors(g.size)), _of_group(g), frozenset(), partial(_drop, structure, g))
        for g in structure.groups
    ]
    edits += [
        Edit(
            partial(scale_pair, model, p, factors(p.size)),
            _of_rows(p),
            frozenset({p.producer}),
            partial(_drop, structure, p),
        )
        for p in structure.pairs
        if p.scales
    ]
    dispose(model, example, edits, reason)
    dispose(model, example, list(_reorderings(model, structure, generator)), "a product of the model changes")


def _reorderings(model: nn.Module, structure: Structure, generator: torch.Generator) -> Iterator[Edit]:
    """A random order for all channels whose order may be changed; where there are heads, within them."""

    def within(size: int, *sets: Tensor) -> Tensor:
        order = torch.arange(size)
        for channels in sets:
            order[channels] = channels[torch.randperm(len(channels), generator=generator)]
        return order

    def keep(name: str) -> Callable[[str], None]:
        return lambda reason: structure.ordered.append(Refused(name, (reason,)))

    for group in structure.groups:
        if isinstance(model.get_submodule(group.norm), nn.GroupNorm | nn.modules.batchnorm._NormBase):
            keep(group.norm)("its channels are not its input's last axis")
            continue
        order = within(group.size, torch.arange(group.size))
        yield Edit(partial(permute_group, model, group, order), _of_group(group), frozenset(), keep(group.norm))
    values = {attention.value.producer for attention in structure.attention}
    for pair in structure.pairs:
        if pair.producer not in values:
            order = within(pair.size, torch.arange(pair.size))
            yield Edit(partial(permute_rows, model, pair, order), _of_rows(pair), _makers(pair), keep(pair.producer))
    for attention in structure.attention:
        value, query, key = attention.value, attention.query, attention.key
        unread = () if value.uses else ("no weight reads its channels",)
        if reasons := value.reasons or unread:
            structure.ordered.append(Refused(f"{attention.path}:pv", reasons))
        else:
            order = within(value.size, *value.distinct)
            apply = partial(permute_rows, model, value, order)
            yield Edit(apply, _of_rows(value), _makers(value), keep(f"{attention.path}:pv"))
        if query is None or key is None:
            structure.ordered.append(Refused(f"{attention.path}:qk", ("q or k is not what a weight makes",)))
        elif reasons := tuple(dict.fromkeys(query.reasons + key.reasons)):
            structure.ordered.append(Refused(f"{attention.path}:qk", reasons))
        else:
            places = [torch.randperm(attention.head_size, generator=generator) for _ in key.distinct]
            apply = partial(permute_scores, model, attention, places)
            touched = _of_rows(query) | _of_rows(key)
            yield Edit(apply, touched, _makers(query) | _makers(key), keep(f"{attention.path}:qk"), attention=True)


def _drop(structure: Structure, item: NormGroup | WeightPair, reason: str) -> None:
    if isinstance(item, NormGroup):
        structure.groups.remove(item)
        structure.refused.append(Refused(item.norm, (reason,)))
    else:
        structure.pairs.remove(item)
        structure.refused.append(Refused(item.producer, (reason,)))


def _of_group(group: NormGroup) -> frozenset[str]:
    return frozenset({group.norm, *group.weights})


def _makers(rows: WeightPair | Projection) -> frozenset[str]:
    return frozenset({rows.producer, *(partner.producer for partner in rows.partners)})


def _of_rows(rows: WeightPair | Projection) -> frozenset[str]:
    biases = {bias for maker in (rows, *rows.partners) for bias in maker.biases}
    return _makers(rows) | biases | {use.weight for use in rows.uses}
