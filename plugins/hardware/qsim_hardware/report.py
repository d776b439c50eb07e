"""The cost of one model under one recipe: what it holds, what each forward computes, and what hardware asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from qsim_core import Cost, Hardware, SiteWork
from qsim_hardware.forward import CountedHardware, Phase
from qsim_hardware.phases import Shapes, cached_bytes

ADDITIVE = ("seconds", "joules")


class PhaseReport(BaseModel):
    """One forward."""

    model_config = ConfigDict(frozen=True)

    name: str
    flops: int = Field(description="multiplications and additions of all products")
    bops: int = Field(description="multiplications x bits of one operand x bits of the other (arXiv 1811.09426)")
    bytes: float = Field(description="read and written by the products, scales included, each weight once")
    flops_between: int = Field(0, description="of the operations between products")
    bytes_between: float = Field(0, description="read and written by the operations between products")
    costs: dict[str, Cost]


class Generation(BaseModel):
    """A prompt and the tokens that follow it. A token costs the mean of the first one and the last one."""

    model_config = ConfigDict(frozen=True)

    totals: dict[str, float] = Field(description="seconds, joules")
    tokens_per_second: float | None = Field(None, description="generated tokens over all seconds; none: no time")


class Report(BaseModel):
    """The whole, as `--json` writes it."""

    model_config = ConfigDict(frozen=True)

    model: str
    recipe: dict[str, Any]
    dtype: str
    batch: int
    prompt: int
    generate: int
    weight_bytes: float = Field(description="of the weights that products read, scales included")
    weight_bits: float = Field(description="bits of an element of these weights, scales included")
    other_bytes: float = Field(description="of all other parameters, in the model's dtype")
    cache_bytes: float | None = Field(description="of keys and values after the prompt, scales included")
    phases: list[PhaseReport]
    generation: dict[str, Generation] = {}
    notes: list[str] = []


def report(
    outline: nn.Module, found: Sequence[Phase], shapes: Shapes, hardware: Sequence[Hardware], **named: Any
) -> Report:
    """Put together what the phases hold, compute and cost."""
    told = [_phase(phase, hardware) for phase in found]
    elements, size = _weights(found[0].work)
    others = sum(parameter.numel() * parameter.element_size() for parameter in _others(outline, found[0].work))
    generating = len(told) > 1
    return Report(
        batch=shapes.batch,
        prompt=shapes.prompt,
        generate=shapes.generate,
        weight_bytes=size,
        weight_bits=8 * size / max(elements, 1),
        other_bytes=others,
        cache_bytes=cached_bytes(outline, found[0].work) if found[0].name == "prompt" else None,
        phases=told,
        generation={str(one): _generation(str(one), told, shapes) for one in hardware} if generating else {},
        **named,
    )


def _phase(phase: Phase, hardware: Sequence[Hardware]) -> PhaseReport:
    work = phase.work
    return PhaseReport(
        name=phase.name,
        flops=sum(2 * one.product.multiplications for one in work),
        bops=sum(one.product.multiplications * one.operands[0].width * one.operands[1].width for one in work),
        bytes=sum(one.bytes for one in work),
        flops_between=sum(one.flops for one in phase.between),
        bytes_between=sum(one.bytes for one in phase.between),
        costs={str(one): _cost(one, phase) for one in hardware},
    )


def _cost(hardware: Hardware, phase: Phase) -> Cost:
    return hardware.cost_of(phase) if isinstance(hardware, CountedHardware) else hardware.cost(phase.work)


def _generation(name: str, told: Sequence[PhaseReport], shapes: Shapes) -> Generation:
    prompt, *tokens = (phase.costs[name].totals for phase in told)
    totals = {
        quantity: prompt[quantity] + shapes.generate * sum(token[quantity] for token in tokens) / len(tokens)
        for quantity in ADDITIVE
        if quantity in prompt
    }
    seconds = totals.get("seconds")
    return Generation(totals=totals, tokens_per_second=shapes.batch * shapes.generate / seconds if seconds else None)


def _weights(work: Sequence[SiteWork]) -> tuple[int, float]:
    """Count the elements and the bytes of the weights that products read, one that several sites read once.

    The factors beside a weight add to its bytes.
    """
    elements: dict[str | None, int] = {}
    sizes: dict[tuple[Any, ...], float] = {}
    for one in work:
        for operand in one.operands:
            if operand.role == "weight":
                elements.setdefault(one.weight, operand.elements)
                sizes[one.weight, one.product.n, one.product.k] = operand.bytes
    return sum(elements.values()), sum(sizes.values())


def _others(model: nn.Module, work: Sequence[SiteWork]) -> list[nn.Parameter]:
    """The parameters that no product reads: embeddings, norms, biases."""
    read = {id(model.get_parameter(one.weight)) for one in work if one.weight is not None}
    return [parameter for parameter in model.parameters() if id(parameter) not in read]
