"""RPTQ: `rptq(clusters=32, head_clusters=4)` puts channels of like ranges side by side, and scales them by cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import nn

import qsim_core as qsim
from qsim_core import Transform, hookimpl
from qsim_core.errors import RecipeError
from qsim_core.formats.format import Format
from qsim_core.quantizers.standard_schemes import Cast
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_rptq.clusters import channel_extremes, cluster_extremes, fold, relative_errors
from qsim_rptq.held import Clustered
from qsim_rptq.steps import Place, steps
from qsim_rptq.unit_interval import UnitInterval


class RPTQ(Transform):
    """Channels in the order of their clusters, and one static scale and zero point for each cluster of activations.

    Reordered are R1 what a norm gives to q, k and v, R2 q with k in each head, R3 v and what reads it in each head, R4
    what a norm gives to the MLP, and R5 what fc1 gives to fc2: clusters are k-means' of each channel's (max, min), and
    the new order is folded into norms and weights, so that the function stays. Then activations are quantized with
    scale = (max - min) / 2^bits and zero = round(-(max + min) / (2 scale)) of each cluster. The bits are those of the
    recipe's activations, whose own scales are not used where RPTQ's are. Source: arXiv 2304.01089, as
    hahnyuan/RPTQ4LLM computes it.

    What cannot be reordered (a residual after the norm, a rotary embedding between q's weight and q·k) is reported with
    the reason and keeps the quantizer that the recipe has for it.
    """

    name = "rptq"
    clusters: int = Field(32, ge=1, description="of the channels of norms, and between fc1 and fc2 (R1, R4, R5)")
    head_clusters: int = Field(4, ge=1, description="of the channels of each head of q with k, and of v (R2, R3)")
    p_bits: int | None = Field(
        8,
        ge=2,
        le=16,
        description="of P, as cast(unit_interval(8)), unless the recipe names probabilities; none: as the recipe says",
    )
    norm_bits: int | None = Field(
        None, ge=2, le=16, description="at least so many for what norms give to weights (R1, R4); none: the recipe's"
    )
    only_kv: bool = Field(False, description="quantize k and v and no other activation")
    momentum: float | None = Field(
        0.99, ge=0, lt=1, description="of extremes averaged over batches; none: the extremes of all data"
    )
    preset: Literal["plain", "paper"] = Field(
        "plain", description="paper: norm_bits is 8 if nothing else is said, what the paper's W4A4 means"
    )

    def apply(self, model: nn.Module, context: Context) -> None:
        """Reorder, then fix scales. Raises `DataError` without calibration data, `RecipeError` without integers."""
        found = list(steps(context, self.clusters, self.head_clusters, self.only_kv))
        elements = {place: self._element(place, step.of_norm) for step in found for place in step.places}
        features, seconds = channel_extremes(context, found) if found else {}, {}
        for step in found:
            if step not in features:
                context.report(step.name, note="left alone: no calibration sample reaches it")
        found = list(features)
        if not found:
            return
        for step, (low, high) in features.items():
            with context.timed() as passed:
                fold(context, step, low, high)
                seconds[step] = passed()
        ranges = cluster_extremes(context, found, self.momentum)
        if self.only_kv:
            _leave_all_but_kv(context.sites.table.values())
        elif self.p_bits is not None:
            for site in context.sites.table.values():
                own = "probabilities" in site.plan.own
                if site.is_value_product and site.planned("input") is not None and not own:
                    site.fixed["input"] = Cast(element=UnitInterval(bits=self.p_bits))
        scales = {
            place: (
                Clustered.covering(low.min(), high.max(), elements[place], 1),
                Clustered.covering(low[groups], high[groups], elements[place], len(low)),
            )
            for place, (low, high, groups) in ranges.items()
        }
        errors = relative_errors(context, found, scales)
        for step in found:
            _fix({place: scales[place][1] for place in step.places})
        for step in found:
            context.report(
                step.name,
                before=errors[step][0],
                after=errors[step][1],
                measure="relative error of activations with one static scale, and with one for each cluster",
                seconds=seconds[step],
                note=f"{len(step.labels.unique())} clusters of {step.size} channels",
            )

    def _element(self, place: Place, of_norm: bool) -> Format:
        """Give the integers of the recipe's quantizer, every code in use; those of a norm have at least `norm_bits`."""
        site, planned = place.site, place.site.planned(place.role)
        element = None if planned is None else planned.rounds_to
        if not isinstance(element, Format) or not element.is_integer:
            named = site.named(place.role)
            raise RecipeError(
                f"{self} finds zero points, which are for integers, and {site.name} has "
                f"{'activations' if named == 'input' else named} {planned}; say int4, or a scheme of it"
            )
        norm_bits = 8 if self.preset == "paper" and self.norm_bits is None else self.norm_bits
        if of_norm and norm_bits is not None and element.width < norm_bits:
            element = qsim.parse(f"int({norm_bits})")
        return element.full()


def _leave_all_but_kv(sites: Iterable[Site]) -> None:
    """Take the quantizers of all activations but k and v away."""
    for site in sites:
        site.fixed["input"] = None
        if not any(alias.endswith((":qk", ":pv")) for alias in site.aliases):
            site.fixed["input2"] = None


def _fix(scales: dict[Place, Clustered]) -> None:
    """Leave the scales at the sites; places with the same ones share them: q, k and v's input is rounded once."""
    made: list[Clustered] = []
    for place, found in scales.items():
        held = replace(found, scale=place.facing(found.scale), zero=place.facing(found.zero))
        held = next((other for other in made if other.same_as(held)), held)
        made.append(held)
        place.site.fixed[place.role] = held


@hookimpl
def qsim_quantizers() -> list[type[Format]]:
    return [UnitInterval]


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [RPTQ]
