"""The audit: every matmul, its quantizers, and the error of each.

The audit runs one batch and looks twice. The sites record what they met, and a dispatch mode below them counts every
matrix product that torch computes outside any site. So products that the sites cannot meet are found, and listed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qsim_core.errors import natural_order
from qsim_core.formats.accelerator import accelerated_errors
from qsim_core.formats.quantizer import Quantizer
from qsim_core.matmuls.dispatch import OperatorWatcher, operator_name, unwatched
from qsim_core.matmuls.partial_sums import PartialSums
from qsim_core.quantizers.standard_schemes import Cast
from qsim_core.simulation.work import Cost, Product, WorkCounter
from qsim_core.sites.arithmetic import QuantizedRows
from qsim_core.sites.executor import SiteObserver
from qsim_core.sites.operation_sites import OperationSite
from qsim_core.sites.site import ATTENTION, Site
from qsim_core.sites.sites import Sites

PRODUCTS = frozenset([
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "mkldnn_linear",
    "_addmm_activation", "_foreach_mm", "_int_mm", "_scaled_mm", "_scaled_mm_v2", "_grouped_mm",
    "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_mixed_dtypes_linear", "_weight_int8pack_mm",
    "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu", "_dyn_quant_matmul_4bit",
    "convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution",
    "_slow_conv2d_forward", "conv_tbc", "_trilinear", "_cdist_forward", "_pdist_forward", "_euclidean_dist",
    "_sparse_mm", "_sparse_addmm", "hspmm", "sspaddmm", "sparse_sampled_addmm", "_sparse_sparse_matmul",
    "_sparse_mm_reduce_impl", "_sparse_semi_structured_linear", "_sparse_semi_structured_mm",
    "_sparse_semi_structured_addmm", "_cslt_sparse_mm",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "_efficient_attention_forward",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "mkldnn_rnn_layer", "_cudnn_rnn",
])  # fmt: skip
"""The ATen operators that multiply matrices."""


class Measured(BaseModel):
    """The effect of quantizing on the tensors at one site."""

    model_config = ConfigDict(frozen=True)

    sqnr_db: float | None = Field(description="10 log10 of signal power over error power; none: no error, or unknown")
    clipped: float | None = Field(description="share of elements beyond what the format reaches; none: unknown")
    flushed: float | None = Field(description="share of non-zero elements that became zero; none: unknown")
    bits: float | None = Field(description="bits per element, the scales' share counted; none: unknown")


class SumsAudit(BaseModel):
    """The sums of one matmul in a simulated arithmetic, as far as they were looked at."""

    model_config = ConfigDict(frozen=True)

    outputs: int = Field(description="outputs that were looked at, of rows at equal distances")
    could_overflow: float | None = Field(
        description="share of outputs whose magnitudes add up to more than the accumulator holds; none: unknown"
    )
    overflowed: float = Field(description="share of outputs of which any running sum left the range, back or not")
    inexact: float = Field(
        description="share of outputs that are not the exact sum; of sums that wrap, the last decides"
    )
    largest: float = Field(description="magnitude of the largest running sum; of codes, in their units")
    bits: int | None = Field(description="bits of that sum in two's complement; none: the sums are not whole")
    safe_rows: float | None = Field(
        description="share of weight rows that no input can make overflow (A2Q's bound); none: unknown"
    )

    @classmethod
    def of(cls, sums: PartialSums) -> SumsAudit:
        """Turn counts into shares."""
        share = 1 / max(sums.outputs, 1)
        return cls(
            outputs=sums.outputs,
            could_overflow=None if sums.could_overflow is None else sums.could_overflow * share,
            overflowed=sums.overflowed * share,
            inexact=sums.inexact * share,
            largest=max(-sums.lowest, sums.highest),
            bits=sums.bits,
            safe_rows=None if sums.safe_rows is None else sums.safe_rows / max(sums.rows, 1),
        )


class SiteAudit(BaseModel):
    """One matmul."""

    model_config = ConfigDict(frozen=True)

    site: str
    aliases: list[str] = []
    op: str
    input: str | None = Field(description="quantizer of every operand that is no parameter")
    weight: str | None
    output: str | None
    arithmetic: str = Field(description="the arithmetic that computed it")
    calls: int = Field(description="how often it was computed, in the audit's batch if there was one")
    products: list[Product] = Field(default=[], description="its products in the audit's batch, by size")
    sums: SumsAudit | None = Field(None, description="its sums in a simulated arithmetic; none: it has no such")
    skipped: bool = False
    measured: dict[str, Measured] = Field(
        default_factory=dict,
        description="by role: input, weight, output; at attention also queries, keys, probabilities, values",
    )
    notes: list[str] = []


class OperationAudit(BaseModel):
    """One operation between products."""

    model_config = ConfigDict(frozen=True)

    site: str
    kinds: list[str] = Field(description="the names of its kind: its own, and that of its family")
    input: str | None = Field(description="quantizer of what it reads")
    output: str | None
    implementation: str | None = Field(description="the way in which it is computed; none: torch's own")
    calls: int
    measured: dict[str, Measured] = Field(
        default_factory=dict, description="by role: input, output, and implementation against torch's own"
    )


class Audit(BaseModel):
    """Every matmul that was found, and the quantizers at its sites."""

    model_config = ConfigDict(frozen=True)

    sites: list[SiteAudit]
    covered: int = Field(description="matmuls with at least one quantizer on an operand or the result")
    found: int
    skipped: list[str] = Field(description="sites that the recipe leaves alone")
    uncovered: list[str] = Field(
        description="products outside any site, and operators not torch's own that may hold one, as path:operator"
    )
    bits_per_weight: float | None = Field(description="over all quantized weights, scales counted; none: unknown")
    bits_per_activation: float | None = Field(description="over all quantized inputs of the batch, scales counted")

    operations: list[OperationAudit] = Field(
        default=[], description="the operations between products, if the recipe names any"
    )
    costs: dict[str, Cost] = Field(default={}, description="what the batch costs on each hardware that was named")
    warnings: list[str] = Field(default=[], description="formats without a scale that lose most of what they see")

    @property
    def notes(self) -> list[str]:
        return [f"{site.site}: {note}" for site in self.sites for note in site.notes]


ATTENTION_ROLES = frozenset(role for roles in ATTENTION.values() for role in roles)

PART = {"cpu": 2**17}
"""Elements that are looked at in float64 at a time, by device; on a CPU they stay in its cache."""


@dataclass
class _Sums:
    """Running sums over the tensors of one role at one site."""

    elements: int = 0
    signal: float = 0.0
    error: float = 0.0
    clipped: int | None = 0
    flushed: int | None = 0
    bits: float | None = 0.0

    @classmethod
    def of(cls, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> _Sums:
        """The sums of a tensor, laid out as rows x K, before and after its quantizer, or exact and approximate."""
        sums = cls()
        with unwatched():
            sums._add(before, after, quantizer)
        return sums

    def _add(self, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        self.elements += before.numel()
        bits = None if quantizer is None else quantizer.bits_per_element(before.shape)
        self.bits = None if bits is None or self.bits is None else self.bits + bits * before.numel()
        if before is after:  # quantized before this audit, and the original is gone
            self.clipped = self.flushed = None
            return
        fast = accelerated_errors(quantizer, before, after)
        if fast is not None:
            for name, value in zip(("signal", "error", "flushed", "clipped"), fast, strict=True):
                own = getattr(self, name)
                setattr(self, name, None if own is None else own + value)
            return
        for x, y in _parts(before, after):
            wide = x.double().flatten()
            self.signal += float(wide.dot(wide))
            wide.sub_(y.flatten())
            self.error += float(wide.dot(wide))
            if self.flushed is not None:
                self.flushed += int(x.bool().logical_and_(y.logical_not()).count_nonzero())
        by_parts = quantizer is not None and quantizer.by_rows and not quantizer.held
        for x, _ in _parts(before, before) if by_parts else [(before, before)]:
            passes = None if quantizer is None else quantizer.passes(x)
            outside = None if passes is None else x.numel() - int(passes.count_nonzero())
            self.clipped = None if outside is None or self.clipped is None else self.clipped + outside

    def include(self, other: _Sums) -> None:
        """Count in the sums of other tensors."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            setattr(self, name, None if own is None or value is None else own + value)

    def result(self) -> Measured:
        """The sums as shares and decibels."""
        share = 1 / max(self.elements, 1)
        ratio = self.signal / self.error if self.error else math.inf
        return Measured(
            sqnr_db=10 * math.log10(ratio) if 0 < ratio < math.inf else None,
            clipped=None if self.clipped is None else self.clipped * share,
            flushed=None if self.flushed is None else self.flushed * share,
            bits=None if self.bits is None else self.bits * share,
        )


def _parts(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give both tensors some rows at a time."""
    if not before.numel():
        return iter(())
    rows = [x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (before, after)]
    size = max(1, PART.get(before.device.type, 2**24) // rows[0].shape[-1])
    return zip(*(x.split(size) for x in rows), strict=True)


class _Outside(OperatorWatcher):
    """Lists the products that are computed while no site is at work."""

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.found: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator_name(func).rstrip("_")
        product = name in PRODUCTS
        if func.namespace != "aten":
            name = f"{func.namespace}::{name}"
            product = _may_multiply((*args, *(kwargs or {}).values()))
        if product and not self.sites.stack.inside:
            frames = self.sites.stack.frames
            self.found[f"{frames[-1].path if frames else ''}:{name}"] += 1
        return func(*args, **(kwargs or {}))


def _may_multiply(arguments: tuple[Any, ...]) -> bool:
    """Tell if an operator that is not torch's own has two matrices to multiply; it may multiply them unseen."""
    return sum(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 for x in arguments) > 1


@dataclass(frozen=True)
class _Looked:
    """The input that was looked at last, and its sums: q, k and v have the same input."""

    before: Tensor
    after: Tensor
    quantizer: Quantizer
    sums: _Sums

    def is_of(self, before: Tensor, after: Tensor, quantizer: Quantizer) -> bool:
        """Tell if these are the same tensors. Values that change in place are quantized into another tensor."""
        if before.data_ptr() == after.data_ptr():
            return False
        pairs = (before, self.before), (after, self.after)
        return quantizer is self.quantizer and all(
            x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() for x, y in pairs
        )


class _Watch:
    """The observer of one audit: gathers sums for each site and role. What it sees, `also` sees too."""

    def __init__(self, also: SiteObserver | None = None) -> None:
        self.also = also
        self.sums: dict[tuple[str, str], _Sums] = defaultdict(_Sums)
        self.operations: dict[tuple[str, str], _Sums] = defaultdict(_Sums)
        self.partial: dict[str, PartialSums] = defaultdict(PartialSums)
        self.dtypes: dict[str, torch.dtype] = {}
        self.doubts: dict[str, dict[str, None]] = defaultdict(dict)
        self.last: _Looked | None = None

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        self.dtypes[site.name] = after.dtype
        if self.also is not None:
            self.also(site, role, before, after, quantizer)
        if quantizer is not None:
            if _scales_each(quantizer, before.shape) and torch.allclose(after, before, rtol=_NOTHING, atol=0.0):
                self.doubts[site.name][
                    f"each element of its {role} has a scale of its own: {quantizer} rounds nothing"
                ] = None
            found = self._of_input(before, after, quantizer) if role == "input" else _Sums.of(before, after, quantizer)
            if role == "weight" and found.bits is not None:
                found.bits += site.bits_beside(before.shape, found.bits)
            self.sums[site.name, role.rstrip("2")].include(found)
            if (named := site.named(role)) in ATTENTION_ROLES:
                self.sums[site.name, named].include(found)

    def _of_input(self, before: Tensor, after: Tensor, quantizer: Quantizer) -> _Sums:
        """The sums of an input, which several layers may share."""
        if self.last is None or not self.last.is_of(before, after, quantizer):
            self.last = _Looked(before, after, quantizer, _Sums.of(before, after, quantizer))
        return self.last.sums

    def examine(self, site: Site, left: QuantizedRows, right: QuantizedRows, product: Tensor) -> None:
        """Count in the sums of a simulated product."""
        self.partial[site.name] += site.plan.arithmetic.partial_sums(left, right, product)

    def operation(
        self, site: OperationSite, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None
    ) -> None:
        """Count in a tensor of an operation between products."""
        self.operations[site.name, role].include(_Sums.of(before, after, quantizer))


_NOTHING = 2.0**-8
"""The relative error that a scale in bfloat16 makes of a value that has it alone."""


def _scales_each(quantizer: Quantizer, shape: torch.Size) -> bool:
    """Tell if blocks have one element. A scale that is not a power of two then maps it to the largest of the format."""
    block = quantizer.granularity
    if block not in quantizer.sharing or not shape or math.prod(shape) < 2:
        return False
    if isinstance(block, tuple):
        return min(block[0], shape[-2]) * min(block[1], shape[-1]) == 1
    return block != "tensor" and min(block if isinstance(block, int) else shape[-1], shape[-1]) == 1


def measured_audit(
    sites: Sites,
    run: Callable[[], Any] | None,
    observer: SiteObserver | None = None,
) -> Audit:
    """Look at one batch, which `run` puts through the model; without it, only at what was met before.

    `observer` sees the tensors of the batch too.
    """
    watch, outside, counter = _Watch(observer), _Outside(sites), WorkCounter()
    calls = {name: site.calls for table in (sites.table, sites.operations.table) for name, site in table.items()}
    if run is not None:
        sites.observer, sites.watcher, sites.operations.observer = watch, counter, watch.operation
        try:
            with outside, sites.uncounted() as calls:  # the audit's own batch leaves no trace at the sites
                run()
        finally:
            sites.observer = sites.watcher = sites.operations.observer = None
    records = [_record(site, calls[site.name], watch, counter) for site in sites.table.values()]
    return Audit(
        sites=records,
        covered=sum(bool(r.input or r.weight or r.output) for r in records),
        found=len(records) + len(outside.found),
        skipped=[r.site for r in records if r.skipped],
        uncovered=sorted(outside.found, key=natural_order),
        bits_per_weight=_mean_bits(watch, "weight"),
        bits_per_activation=_mean_bits(watch, "input"),
        operations=[_operation(site, calls[site.name], watch) for site in sites.operations.table.values()],
        warnings=list(_unfit(sites.table.values(), records)),
    )


def _unfit(sites: Iterable[Site], records: Iterable[SiteAudit]) -> Iterator[str]:
    """Give a line for each format without a scale that clips or flushes most elements at a site."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for site, record in zip(sites, records, strict=True):
        for role in ("weight", "input", "output"):
            quantizer, measured = getattr(site.plan, role), record.measured.get(role)
            lost = 0.0 if measured is None else (measured.clipped or 0.0) + (measured.flushed or 0.0)
            if isinstance(quantizer, Cast) and lost > 0.5:
                found[role, str(quantizer)].append((lost, site.name))
    for (role, quantizer), places in found.items():
        worst, name = max(places)
        yield (
            f"{quantizer} has no scale, and clips or flushes most of the {role} at {len(places)} sites ({worst:.0%} at "
            f"{name}); say a scheme, like token(…) or tensor(…), if that is not meant"
        )


def _record(site: Site, calls: int, watch: _Watch, counter: WorkCounter) -> SiteAudit:
    plan = site.plan
    roles = {role: sums.result() for (name, role), sums in watch.sums.items() if name == site.name}
    return SiteAudit(
        site=site.name,
        aliases=site.aliases,
        op=site.op,
        input=", ".join(dict.fromkeys(map(str, site.inputs))) or None,
        weight=str(plan.weight) if plan.weight and site.weight else None,
        output=str(plan.output) if plan.output else None,
        arithmetic=site.arithmetic
        if site.arithmetic != "float32"
        else str(watch.dtypes.get(site.name, torch.float32))[6:],
        calls=calls,
        products=counter.products(site.name),
        sums=SumsAudit.of(watch.partial[site.name]) if site.name in watch.partial else None,
        skipped=plan.skipped,
        measured=roles,
        notes=[*watch.doubts[site.name], *_notes(site, site.plan.value_axis)],
    )


def _operation(site: OperationSite, calls: int, watch: _Watch) -> OperationAudit:
    plan = site.plan
    return OperationAudit(
        site=site.name,
        kinds=list(site.kinds),
        input=str(plan.input) if plan.input else None,
        output=str(plan.output) if plan.output else None,
        implementation=str(plan.implementation) if plan.implementation else None,
        calls=calls,
        measured={role: sums.result() for (name, role), sums in watch.operations.items() if name == site.name},
    )


def _notes(site: Site, value_axis: str) -> list[str]:
    """Give notes for a careful reader: scales that depend on other samples, or on later tokens."""
    notes = []
    if site.weight is None and (site.op == "linear" or site.op.startswith("conv")):
        notes.append("its weight is computed from no parameter alone: it takes the quantizer of activations")
    if site.computed:
        notes.append(f"its weight is computed from {site.weight}, and is quantized in each forward")
    notes += [f"in training it is not quantized: {site.in_training}"] if site.in_training else []
    notes += [f"its {role} is rotated by {rotation}" for role, rotation in site.rotations.items()]
    notes += [f"beside its weight stand {site.beside}"] if site.beside else []
    for role, quantizer in (*(("input", quantizer) for quantizer in site.inputs), ("output", site.plan.output)):
        sharing = quantizer.sharing if quantizer is not None else frozenset()
        if isinstance(quantizer, Quantizer) and quantizer.granularity is None and not quantizer.by_rows:
            notes.append(f"{quantizer} does not say what shares a scale: its {role} may depend on later tokens")
        if "tensor" in sharing:
            notes.append(f"one {role} scale for the whole tensor: it depends on the batch and sees later tokens")
        for rows in sorted(block[0] for block in sharing if isinstance(block, tuple) and block[0] > 1):
            notes.append(f"{role} scales are shared over {rows} rows and see later tokens")
        if role == "input" and site.over_positions and sharing - {"tensor"}:
            notes.append("input scales are shared over the positions of a group of channels, later ones too")
        of_values = role == "input" and quantizer is (
            site.fixed["input2"] if "input2" in site.fixed else site.planned("input2")
        )
        if of_values and site.is_value_product and value_axis == "tokens" and sharing - {"tensor"}:
            notes.append("v's scales are shared over tokens and see later ones (value_axis head: they do not)")
    return notes


def _mean_bits(watch: _Watch, role: str) -> float | None:
    sums = [sums for (_, r), sums in watch.sums.items() if r == role]
    if not sums or any(s.bits is None for s in sums):
        return None
    return sum(s.bits or 0.0 for s in sums) / sum(s.elements for s in sums)
