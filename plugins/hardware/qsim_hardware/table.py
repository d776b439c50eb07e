"""The table that `qsim cost` prints: totals by forward, then the sites that cost most."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.table import Table

from qsim_core.cli.console import console, print_below
from qsim_hardware.report import ADDITIVE, PhaseReport, Report

SHOWN = 8
"""The groups of sites that are listed."""
LONGEST = 24
"""Characters of the name of hardware in the table."""
PREFIXES = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n"}
LAYER = re.compile(r"^.*?\.\d+(?=[.:])")
"""The beginning of a site's name up to the number of its layer."""
UNITS = {"seconds": "s", "joules": "J", "bytes": "B", "flops": "FLOP", "bops": "BOP"}
WORK = {
    "flops": "FLOPs",
    "bops": "BOPs",
    "bytes": "bytes read and written",
    "flops_between": "FLOPs between products",
    "bytes_between": "bytes between products",
}


def show(found: Report) -> None:
    """Print a report."""
    out = console()
    out.print(_totals(found))
    for name in next(iter(found.phases)).costs:
        quantity = next(iter(found.phases[0].costs[name].totals))
        if quantity in ADDITIVE:
            out.print()
            out.print(_sites(found, name, quantity))
    for line in _lines(found):
        print_below(out, line)


def _totals(found: Report) -> Table:
    table = Table(title=found.model, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    for quantity, title in WORK.items():
        if quantity.endswith("_between") and not any(phase.bytes_between for phase in found.phases):
            continue
        table.add_row(title, *(amount(getattr(phase, quantity), quantity) for phase in found.phases))
    for name in found.phases[0].costs:
        table.add_section()
        costs = [phase.costs[name].totals for phase in found.phases]
        for quantity in costs[0]:
            title = f"{short(name)}: {quantity.replace('_', ' ')}"
            table.add_row(title, *(amount(totals[quantity], quantity) for totals in costs))
    return table


def _sites(found: Report, name: str, quantity: str) -> Table:
    """The sites that cost most; those of all layers are one row."""
    groups = [_groups(phase, name, quantity) for phase in found.phases]
    table = Table(
        "site", title=f"{quantity} on {short(name)}, * of all layers", title_justify="left", box=None, pad_edge=False
    )
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    words = sorted({word for each in groups for _, told in each.values() for word in told})
    for word in words:
        table.add_column(word)
    for group in sorted(groups[0], key=lambda group: -max(each[group][0] for each in groups if group in each))[:SHOWN]:
        cells = [each.get(group, (0.0, {})) for each in groups]
        told = (" / ".join(dict.fromkeys(words_of.get(word, "") for _, words_of in cells)) for word in words)
        table.add_row(group, *(amount(number, quantity) for number, _ in cells), *told)
    return table


def _groups(phase: PhaseReport, name: str, quantity: str) -> dict[str, tuple[float, dict[str, str]]]:
    """By group of sites, the sum of a quantity, and the words about its last site."""
    found: dict[str, tuple[float, dict[str, str]]] = {}
    for site, told in phase.costs[name].sites.items():
        group = LAYER.sub("*", site, 1)
        words = {key: value for key, value in told.items() if isinstance(value, str)}
        found[group] = found.get(group, (0.0, {}))[0] + float(told[quantity]), words
    return found


def _lines(found: Report) -> Iterator[str]:
    parts = [
        f"weights of products {amount(found.weight_bytes, 'bytes')}, {found.weight_bits:.3g} bits each with scales",
        f"other parameters {amount(found.other_bytes, 'bytes')}",
    ]
    if found.cache_bytes is not None:
        parts.append(f"keys and values after the prompt {amount(found.cache_bytes, 'bytes')}")
    yield "; ".join(parts)
    for name, generation in found.generation.items():
        if generation.totals:
            totals = ", ".join(amount(number, quantity) for quantity, number in generation.totals.items())
            speed = generation.tokens_per_second
            tokens = "" if speed is None else f", {speed:.4g} tokens a second"
            yield f"{short(name)}: {found.batch} x ({found.prompt} + {found.generate} tokens) in {totals}{tokens}"
    quantizers = (f"{key} {found.recipe[key] or 'as they are'}" for key in ("weights", "activations", "outputs"))
    yield f"{', '.join(quantizers)}; what is not quantized is in {found.dtype}"
    if found.recipe["skip"]:
        yield f"left alone: {', '.join(found.recipe['skip'])} (--skip none quantizes everything)"
    for name, cost in found.phases[0].costs.items():
        yield f"{short(name)}: {'; '.join(cost.assumptions)}"
    yield from found.notes


def short(name: str) -> str:
    """The text of hardware, cut off if it is long."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def amount(number: float, quantity: str) -> str:
    """A number with its unit, like 3.42 ms."""
    unit = UNITS.get(quantity.partition("_")[0])
    if unit is None:
        return f"{number:,.0f}"
    factor, prefix = next(((factor, prefix) for factor, prefix in PREFIXES.items() if number >= factor), (1, ""))
    return f"{number / factor:.3g} {prefix}{unit}"
