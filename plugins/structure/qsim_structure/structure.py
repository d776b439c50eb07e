"""The structure of a model: norms and the weights that read them, pairs of weights, attention.

`trace` runs one example and finds the sources of channels and the weights that read them. Then it checks the result
numerically: it folds random factors and random orders, and compares every product of the model. Where a product
changes, the fold is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qsim_structure.channels import Partner, Rows, Source, Use
from qsim_structure.equivalence_check import Edit, Recorder, Run, refuse_changed_products
from qsim_structure.errors import StructureError
from qsim_structure.folding import GroupScaling, permute_group, permute_rows, permute_scores, scale_pair
from qsim_structure.heads import Attention, Projection, attention_in
from qsim_structure.operator_watcher import in_eval_mode
from qsim_structure.tracing import Tracer

Check = Literal["groups", "pairs", "orders"]
CHECKS: tuple[Check, ...] = get_args(Check)
"""The checks of a structure: the factors of norm groups, those of weight pairs, and the orders of channels."""


@dataclass(frozen=True)
class NormGroup:
    """A norm and all the weights that read its output. A factor on a channel can be moved from the norm to them."""

    norm: str
    """The path of the norm's module."""
    size: int
    uses: tuple[Use, ...]
    offset: float
    """0 if the norm multiplies by its weight, 1 if it multiplies by one plus its weight (Gemma)."""

    @property
    def weights(self) -> list[str]:
        """The names of the weights that read it, each once, in the order of the forward."""
        return list(dict.fromkeys(use.weight for use in self.uses))


@dataclass(frozen=True)
class WeightPair(Rows):
    """A weight that makes channels which other weights read. They may be permuted, and scaled if `scales` is true."""

    size: int
    uses: tuple[Use, ...]
    scales: bool
    partners: tuple[Partner, ...] = ()
    """Weights whose channels are multiplied with these (gate and up): they are permuted together."""

    @property
    def weights(self) -> list[str]:
        """The names of the weights that read the channels, each once, in the order of the forward."""
        return list(dict.fromkeys(use.weight for use in self.uses))


@dataclass(frozen=True)
class Refused:
    """A norm, weight or product that may not be folded, with the reasons."""

    name: str
    reasons: tuple[str, ...]


@dataclass
class Structure:
    """The norm groups, weight pairs and attention of one model, and what was refused."""

    groups: list[NormGroup] = field(default_factory=list)
    pairs: list[WeightPair] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    ordered: list[Refused] = field(default_factory=list)
    """Norms and producers whose channels must keep their order, with the reasons.

    For orders within heads the name is `path:qk` (q with k) or `path:pv` (v).
    """

    readers: dict[str, list[str]] = field(default_factory=dict)
    """For weights that operators other than products read too, such as a look-up or a sum, the names of these."""

    def why_ordered(self, name: str) -> str:
        """Return the reasons why channels must keep their order; an empty text if they need not."""
        return "; ".join(reason for refused in self.ordered if refused.name == name for reason in refused.reasons)

    def group_of(self, weight: str) -> NormGroup | None:
        """Return the norm group that a weight reads from."""
        return next((group for group in self.groups if weight in group.weights), None)


def trace(
    model: nn.Module,
    run: Run,
    declared: Mapping[str, Sequence[str]] | None = None,
    *,
    checks: Collection[Check] = CHECKS,
    copied_bytes: int | None = None,
) -> Structure:
    """Find the structure of a model by running it, and check numerically that all of it can be folded.

    `run` runs one example through the model, such as `lambda: model(x)`, and is called several times: in eval mode,
    without gradients, with torch's generators at 0. All weights must be in memory. The model is restored.

    `declared` gives, for norms by module path, the weights that read them, in place of those that tracing finds. It is
    checked too. Raises `StructureError` if it names a norm or a weight that the model does not have, and for a model
    that is lazy or exported.

    `checks` names what is needed: the factors of norm groups, those of weight pairs, and orders. Norm groups are all
    checked in one run; the other checks take a run for each eighth of the model that they change. Pairs and refused
    orders are left out where they are not checked.

    `copied_bytes` limits the weights that the check copies at a time; by default 64 MiB, or an eighth of the model if
    that is more. Less memory takes more runs.
    """
    _check_open(model)
    recorder = Recorder(model)
    with recorder:
        tracer = Tracer(model).watch(run)
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
    if "pairs" not in checks and "orders" not in checks:
        structure.pairs.clear()
    structure.attention = attention_in(tracer)
    structure.readers = {name: sorted(operators) for name, operators in tracer.readers.items() if operators}
    refuse = partial(refuse_changed_products, model, run, copied_bytes=copied_bytes, exact=recorder)
    _check(refuse, model, structure, checks)
    return structure


def _check_open(model: nn.Module) -> None:
    """Raise `StructureError` for a model that is exported or lazy: it cannot be run as it is."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise StructureError(f"{name} is lazy and has no shape yet; run the model once before")
    try:
        with in_eval_mode(model):
            pass
    except NotImplementedError as error:
        raise StructureError(f"the model has no eval mode ({error}); give the module that it was made of") from None


def _declare(model: nn.Module, tracer: Tracer, declared: Mapping[str, Sequence[str]]) -> None:
    """Put a declaration in place of the uses that were found: each weight reads all channels in their order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for norm, weights in declared.items():
        source = tracer.sources.get(("norm", norm))
        if source is None:
            raise StructureError(f"{norm!r} is declared as a norm, and the model does not run a norm of that name")
        source.refusals.clear()
        source.uses.clear()
        for name in weights:
            if name not in parameters:
                raise StructureError(
                    f"{norm!r} is declared to be read by {name!r}, which is not a parameter of the model"
                )
            axes = [axis for axis, size in enumerate(parameters[name].shape) if size == source.size]
            if not axes:
                raise StructureError(
                    f"{name!r} is declared to read the {source.size} channels of {norm!r}; no axis fits"
                )
            channels = torch.arange(source.size)
            source.uses += [Use(name, axes[-1], channels, True, event) for event in tracer.events[name] or {0}]


def _conflicts(source: Source, tracer: Tracer) -> list[str]:
    """List the reasons why the weights that read a source may not be changed with it."""
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
        offset = source.offset
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
    uses, partners = _unique(source.uses), tracer.partners(source)
    return WeightPair(source.name, source.axis, tuple(source.biases), source.size, uses, scales, partners)


def _unique(uses: Sequence[Use]) -> tuple[Use, ...]:
    return tuple({(use.weight, use.axis): use for use in uses}.values())


def _check(
    refuse: Callable[[Sequence[Edit], str], None], model: nn.Module, structure: Structure, checks: Collection[Check]
) -> None:
    """Fold random factors, then random orders, and refuse the folds that change a product."""
    generator = torch.Generator().manual_seed(0)
    reason = "a product of the model changes when it is folded"

    def factors(size: int) -> Tensor:
        return torch.exp2(torch.randint(-1, 2, (size,), generator=generator).double())  # exact in any precision

    edits = [_scaling(model, structure, group, generator) for group in structure.groups if "groups" in checks]
    edits += [
        Edit(
            partial(scale_pair, model, p, factors(p.size)),
            _of_rows(p),
            frozenset({p.producer}),
            partial(_drop, structure, p),
        )
        for p in structure.pairs
        if p.scales and "pairs" in checks
    ]
    refuse(edits, reason)
    if "orders" in checks:
        refuse(list(_reorderings(model, structure, generator)), "a product of the model changes")


def _scaling(model: nn.Module, structure: Structure, group: NormGroup, generator: torch.Generator) -> Edit:
    """Make an edit that scales a norm group by 1, 2 and 4: the columns get their values back without a copy."""
    factors = torch.exp2(torch.randint(0, 3, (group.size,), generator=generator).double())
    scaling = GroupScaling(model, group, factors)
    drop = partial(_drop, structure, group)
    return Edit(scaling.apply, _of_group(group), frozenset(), drop, undo=scaling.undo, undone=scaling.undone)


def _reorderings(model: nn.Module, structure: Structure, generator: torch.Generator) -> Iterator[Edit]:
    """Yield a random order for all channels whose order may change; within the heads of attention."""

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
        reasons = tuple(dict.fromkeys(reason for partner in pair.partners for reason in partner.reasons))
        if reasons:
            structure.ordered.append(Refused(pair.producer, reasons))
        elif pair.producer not in values:
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
            places = [torch.randperm(key.heads.shape[-1], generator=generator) for _ in key.distinct]
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
