"""What a model looks like: norms and the weights that read them, pairs of weights, attention.

Tracing proposes: `trace` runs one example and finds who makes channels and who reads them. A numeric check disposes:
all that is to be folded is folded with random factors, and every product with a weight must come out as before. What
does not hold is refused, with the reason, and never folded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qsim_core.addresses import Parameters
from qsim_core.channels import WITH_WEIGHT, Source, Use
from qsim_core.errors import ModelError
from qsim_core.forward import Example, as_in_evaluation, call
from qsim_core.tracing import Tracer

TOLERANCE = 2e-4
"""Of the largest value of each product, in float32, under factors between 1/2 and 2."""


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
class WeightPair:
    """A weight whose rows are another's columns: channels may be permuted, and scaled where `scales`."""

    producer: str
    axis: int
    """Of the producer's axes, the one that makes the channels."""
    biases: tuple[str, ...]
    size: int
    uses: tuple[Use, ...]
    scales: bool
    partners: tuple[str, ...] = ()
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
    partners = tuple(other.name for other in others if other.kind == "linear")
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


@torch.no_grad()
def scale_group(model: nn.Module, group: NormGroup, factors: Tensor) -> None:
    """Divide a norm's channels by `factors` [size] and multiply the columns that read them; the function stays."""
    module = model.get_submodule(group.norm)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)
    wide = factors.to(weight.device, torch.float64)
    weight.copy_((weight.double() + group.offset) / wide - group.offset)
    if isinstance(bias, nn.Parameter):
        bias.copy_(bias.double() / wide)
    _scale_uses(model, group.uses, wide)


@torch.no_grad()
def scale_pair(model: nn.Module, pair: WeightPair, factors: Tensor) -> None:
    """Divide the rows of the producer, and its biases, by `factors` [size], and multiply the columns that read them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wide = factors.double()
    producer = parameters[pair.producer]
    producer.copy_(producer.double() / _facing(wide, producer, pair.axis))
    for name in pair.biases:
        parameters[name].copy_(parameters[name].double() / wide)
    _scale_uses(model, pair.uses, wide)


def _scale_uses(model: nn.Module, uses: Sequence[Use], factors: Tensor) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for use in uses:
        read = torch.where(use.channels >= 0, factors[use.channels.clamp(min=0)], 1.0)
        parameter = parameters[use.weight]
        parameter.copy_(parameter.double() * _facing(read, parameter, use.axis))


def _facing(values: Tensor, parameter: Tensor, axis: int) -> Tensor:
    """Values along an axis of a parameter, shaped to be multiplied with it."""
    return values.view([-1 if place == axis else 1 for place in range(parameter.dim())])


def _check(model: nn.Module, example: Example, structure: Structure) -> None:
    """Fold everything with random factors: all at once, and where a product changes, one by one."""
    exact = _products(model, example)
    foldable: list[NormGroup | WeightPair] = [*structure.groups, *(pair for pair in structure.pairs if pair.scales)]
    if not foldable or _holds(model, example, foldable, exact):
        return
    for item in foldable:
        if _holds(model, example, [item], exact):
            continue
        reason = "a product of the model changes when it is folded"
        if isinstance(item, NormGroup):
            structure.groups.remove(item)
            structure.refused.append(Refused(item.norm, (reason,)))
        else:
            structure.pairs.remove(item)
            structure.refused.append(Refused(item.producer, (reason,)))


def _holds(
    model: nn.Module, example: Example, items: Sequence[NormGroup | WeightPair], exact: dict[str, list[Tensor]]
) -> bool:
    """Whether every product but the producers' own comes out as before, each item folded with factors of its own."""
    touched = {item.norm if isinstance(item, NormGroup) else item.producer for item in items}
    weights = {weight for item in items for weight in item.weights} | touched
    kept = {
        n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False) if _touches(n, items, weights)
    }
    generator = torch.Generator().manual_seed(0)
    try:
        for item in items:
            factors = torch.exp2(2 * torch.rand(item.size, generator=generator, dtype=torch.float64) - 1)
            scale_group(model, item, factors) if isinstance(item, NormGroup) else scale_pair(model, item, factors)
        folded = _products(model, example)
    finally:
        with torch.no_grad():
            parameters = dict(model.named_parameters(remove_duplicate=False))
            for name, values in kept.items():
                parameters[name].copy_(values)
    producers = {item.producer for item in items if isinstance(item, WeightPair)}
    return all(
        len(before) == len(folded[name]) and all(_close(a, b) for a, b in zip(before, folded[name], strict=True))
        for name, before in exact.items()
        if name not in producers
    )


def _touches(name: str, items: Sequence[NormGroup | WeightPair], weights: set[str]) -> bool:
    biases = {bias for item in items if isinstance(item, WeightPair) for bias in item.biases}
    return name in weights or name in biases or name.rpartition(".")[0] in weights


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp(min=1e-30))


class _Recorder(TorchDispatchMode):
    """Keeps the results of all products with a parameter, by the parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = Parameters(model)
        self.results: dict[str, list[Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        places = WITH_WEIGHT.get(name) or ((0, 1) if "convolution" in name else None)
        if places is not None:
            found = self.parameters.of(args[places[1]]) or self.parameters.of(args[places[0]])
            if found is not None:
                self.results[found[0]].append(out.detach().double())
        return out


def _products(model: nn.Module, example: Example) -> dict[str, list[Tensor]]:
    recorder = _Recorder(model)
    with as_in_evaluation(model), recorder:
        call(model, example)
    return dict(recorder.results)
