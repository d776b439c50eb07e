"""Time by the roofline: a product takes the time of its arithmetic or of its memory traffic, whichever is longer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from qsim_core import Cost, Format, SiteWork
from qsim_hardware.between import OperationWork
from qsim_hardware.formats import format_of, holds, name_of
from qsim_hardware.forward import CountedHardware, Phase

ALONE = "matmuls alone: no softmax, norms, embeddings or biases"
BETWEEN = (
    "softmax, norms, activation functions, residual sums, rotary and other embeddings read operands and write results "
    "once, in the model's dtype where the recipe names nothing else; no biases, gates, masks or copies"
)


class _Step(NamedTuple):
    """One product, or one operation between products, with the unit that computes it."""

    site: str
    flops: int
    bytes: float
    unit: str
    rate: float
    notes: Iterable[str]


def _pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


class Roofline(CountedHardware):
    """A device with a peak rate for each number format, and one memory.

        seconds = max(2 batch M N K / (peak * efficiency), bytes / bandwidth)

    Products run one after the other. Bytes are those of both operands and of the result, as wide as their formats,
    scales included. A weight is read once in a forward. A product runs in the narrowest format of the device that holds
    all values of both operands. Where none does, it runs in float32, or in the device's widest format. The result says
    so.

    An operation between products, such as softmax, is one step more: max(operations / (float32 * efficiency), bytes /
    bandwidth), at the widest format's rate where there is no float32.

    Source: Williams et al., "Roofline" (CACM 52(4), 2009); by product as in LLM-Viewer (arXiv 2402.16363).
    """

    name = "roofline"
    flops: Annotated[tuple[tuple[Format, PositiveFloat], ...], BeforeValidator(_pairs)] = Field(
        min_length=1, description="formats, and the operations a second in each; an addition counts too"
    )
    bandwidth: PositiveFloat = Field(description="bytes that the memory reads or writes in a second")
    float32: PositiveFloat | None = Field(None, description="operations a second in float32; none: it has no such unit")
    efficiency: float = Field(1.0, gt=0, le=1, description="share of the peak rates that is reached")
    operations: bool = Field(True, description="price the operations between products too, such as softmax")

    @model_validator(mode="after")
    def _one_rate_each(self) -> Self:
        named = [str(unit) for unit, _ in self.flops]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"flops has two rates for {twice[0]}")
        return self

    def cost(self, work: Sequence[SiteWork]) -> Cost:
        """Compute the seconds of each product, and add them up."""
        return self.cost_of(Phase("forward", work))

    def products_only(self) -> Self:
        """Give the same device without operations between products."""
        return self.replace(operations=False)

    def cost_of(self, phase: Phase) -> Cost:
        """Compute the seconds of each product and of each operation, and add them up."""
        work, between = phase.work, phase.between if self.operations else ()
        sites: dict[str, dict[str, float | str]] = {}
        longest: dict[str, float] = defaultdict(float)
        bound_by = dict.fromkeys(("compute", "memory"), 0.0)
        notes: dict[str, None] = {}
        for step in (*map(self._product, work), *map(self._operation, between)):
            notes |= dict.fromkeys(step.notes)
            times = {"compute": step.flops / (step.rate * self.efficiency), "memory": step.bytes / self.bandwidth}
            bound = max(times, key=times.__getitem__)
            seconds = times[bound]
            bound_by[bound] += seconds
            site: dict[str, Any] = sites.setdefault(step.site, {"seconds": 0.0, "flops": 0, "bytes": 0.0})
            site |= {"seconds": site["seconds"] + seconds, "flops": site["flops"] + step.flops}
            site["bytes"] += step.bytes
            if seconds >= longest[step.site]:
                longest[step.site] = seconds
                site |= {"bound": bound, "unit": step.unit}
        return Cost(
            totals={
                "seconds": sum(bound_by.values()),
                "seconds_bound_by_compute": bound_by["compute"],
                "seconds_bound_by_memory": bound_by["memory"],
            },
            sites=sites,
            assumptions=[*self._assumptions(), BETWEEN if between else ALONE, *notes],
        )

    def _product(self, one: SiteWork) -> _Step:
        return _Step(one.site, 2 * one.product.multiplications, one.bytes, *self._unit(one))

    def _operation(self, one: OperationWork) -> _Step:
        widest = max(self.flops, key=lambda pair: (pair[0].width, pair[1]))
        unit, rate = (str(widest[0]), widest[1]) if self.float32 is None else ("float32", self.float32)
        return _Step(one.site, one.flops, one.bytes, unit, rate, ())

    def _unit(self, one: SiteWork) -> tuple[str, float, Iterable[str]]:
        """The name and the rate of the unit that computes a product, and a note where no operand is of its format."""
        wanted = [format_of(operand) for operand in one.operands]
        names = " by ".join(map(name_of, one.operands))
        narrowest_first = sorted(self.flops, key=lambda pair: (pair[0].width, -pair[1]))
        for unit, rate in narrowest_first:
            if all(format is not None and holds(unit, format) for format in wanted):
                return str(unit), rate, () if unit in wanted else [f"{names} runs in {unit}"]
        if self.float32 is not None:
            return "float32", self.float32, () if None in wanted else [f"{names} runs in float32"]
        unit, rate = narrowest_first[-1]
        return str(unit), rate, [f"{names} runs in {unit}, which does not hold all of their values"]

    def _assumptions(self) -> list[str]:
        return [
            f"roofline at {self.efficiency:.0%} of peak and all of the bandwidth",
            "products one after the other: no overlap, no fusion, no on-chip reuse between them",
            "scales take memory and no arithmetic",
        ]
