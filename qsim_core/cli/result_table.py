"""The table that the command line prints of a result, and the lines under it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from math import isfinite, isnan
from typing import Literal

from rich.table import Table
from rich.text import Text

from qsim_core.cli.console import console, print_below
from qsim_core.evaluation.result import Result
from qsim_core.simulation.audit import Audit
from qsim_core.simulation.recipe import ROLES
from qsim_core.transforms.report import LayerReport


def show(result: Result) -> None:
    """Print the table of one result, and the lines under it."""
    audit = result.audit
    table = recipe_table(result)
    table.add_section()
    table.add_row(f"{result.environment.dtype} {result.metric}", measured(result, "baseline"))
    if not result.alone:
        table.add_row(f"simulated {result.metric}", Text(measured(result, "simulated"), "bold"))
        if not isnan(result.ratio):
            table.add_row("ratio", with_interval(result.ratio, _interval(result, "ratio")))
    table.add_section()
    table.add_row("matmuls quantized", f"{audit.covered} of {audit.found}")
    table.add_row("bits per weight", bits(audit.bits_per_weight))
    table.add_row("bits per activation", bits(audit.bits_per_activation))
    table.add_section()
    for hardware, cost in audit.costs.items():
        quantity, amount = next(iter(cost.totals.items()))
        table.add_row(f"{quantity} of a batch, {hardware}", f"{amount:.3g}")
    table.add_section()
    before_that = " (of an earlier run)" if "baseline" in result.cached else ""
    table.add_row("seconds, baseline", f"{result.seconds['baseline']:.1f}{before_that}")
    if not result.alone:
        table.add_row("seconds, simulated", f"{result.seconds['simulated']:.1f}")
    table.add_row("seconds, in all", f"{result.seconds['total']:.1f}")
    out = console()
    out.print(table)
    for line in _lines(result):
        print_below(out, line)


def recipe_table(result: Result) -> Table:
    """A table with the model's name as its title, and the recipe's quantizers and transforms as its first rows."""
    table = Table(title=result.model, title_justify="left", title_style="bold", show_header=False, min_width=60)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for key in ("weights", "activations", "outputs"):
        table.add_row(key, result.recipe[key] or "as they are")
    for role in ROLES:
        if role in result.recipe:
            table.add_row(role, result.recipe[role] or "as they are")
    for pattern, change in result.recipe.get("operations", {}).items():
        said = (text if key == "implementation" else f"{key} {text}" for key, text in change.items())
        table.add_row(pattern, ", ".join(said))
    for transform in result.recipe["transforms"]:
        table.add_row("after", transform)
    return table


def measured(result: Result, which: Literal["baseline", "simulated"]) -> str:
    """The first metric of the baseline or of the simulation, with its interval."""
    return with_interval(getattr(result, which)[result.metric], _interval(result, which))


def _interval(result: Result, which: str) -> tuple[float, float] | None:
    spread = result.intervals.get(result.metric)
    return getattr(spread, which) if spread else None


def _lines(result: Result) -> Iterator[str]:
    """The lines under the table: protocol, data, exceptions, intervals, and what each transform did."""
    audit = result.audit
    limit = result.limit
    some = "" if limit is None else f"; of {limit} sample{'s' if limit > 1 else ''} only (--limit)"
    yield f"{result.protocol}; {result.data.name} (sha256 {result.data.sha256[:12]}){some}"
    for pattern, exception in result.recipe.get("overrides", {}).items():
        said = ", ".join(f"{role} {text or 'as they are'}" for role, text in exception.items())
        yield f"otherwise at {pattern}: {said}"
    if result.baseline_of is not None:
        yield f"{result.environment.dtype} {result.metric} is that of {result.baseline_of}"
    if result.metric in result.intervals:
        over = "over the samples, the ratio's over the same ones before and after"
        yield f"in brackets: 95% confidence intervals {over}"
    elif result.samples is not None:
        yield f"no confidence intervals: {result.samples} samples are too few"
    others = [key for key in result.simulated if key != result.metric]
    if others:
        yield "; ".join(_change(key, result.baseline.get(key), result.simulated[key]) for key in others)
    if result.recipe["skip"] and not result.alone:
        yield f"left alone: {', '.join(result.recipe['skip'])} (--skip none quantizes everything)"
    for transform in dict.fromkeys(report.transform for report in result.transforms):
        yield _done(transform, [report for report in result.transforms if report.transform == transform])
    if (arithmetic := result.recipe["arithmetic"]) not in ("auto", "float32"):
        yield _computed_in(arithmetic, audit)
    yield from _sums(audit)
    for hardware, cost in audit.costs.items():
        yield f"{hardware}, for the audit's batch: {'; '.join(cost.assumptions)}"
    if audit.uncovered:
        yield f"not reached: {', '.join(audit.uncovered)}"
    grouped: dict[str, list[str]] = {}
    for site in audit.sites:
        for note in site.notes:
            grouped.setdefault(note, []).append(site.site)
    for note, sites in grouped.items():
        yield f"{len(sites)} site{'s' if len(sites) > 1 else ''}, like {sites[0]}: {note}"


def _computed_in(arithmetic: str, audit: Audit) -> str:
    """Tell how many matmuls an arithmetic computed, and the first one that is quantized and that it declined."""
    took = sum(site.arithmetic == arithmetic for site in audit.sites)
    said = f"{took} of {audit.found} matmuls were computed in {arithmetic}"
    others = [site for site in audit.sites if site.arithmetic != arithmetic and not site.skipped]
    if not others:
        return said
    left, right = others[0].input, others[0].weight or others[0].input
    operands = f"{left or 'no quantizer'} and {right or 'no quantizer'}"
    return f"{said}; the others do not fit it here, like {others[0].site} with {operands}"


def _sums(audit: Audit) -> Iterator[str]:
    """A line about the running sums of simulated arithmetics: the worst site, and the bits that all sites need."""
    found = [(site.sums, site.site) for site in audit.sites if site.sums is not None]
    if not found:
        return
    most = max((sums.bits for sums, _ in found if sums.bits is not None), default=None)
    needs = "" if most is None else f"; the largest needs {most} bits"
    over, where, wrong = max((sums.overflowed, name, sums.inexact) for sums, name in found)
    inexact, place = max((sums.inexact, name) for sums, name in found)
    lost = (
        f"left the range in {over:.2%} of outputs at {where}, {wrong:.2%} are wrong" if over else "none left the range"
    )
    rounded = f", {inexact:.2%} lost low bits at {place}" if inexact > over else ""
    yield f"running sums: {lost}{rounded}{needs}"


def _done(transform: str, reports: list[LayerReport]) -> str:
    """One line about a transform: the median error before and after, and the layers that it left alone."""
    changed = [report for report in reports if report.before is not None and report.after is not None]
    line = f"{transform}: {len(changed)} layers"
    if changed:
        before, after = (statistics.median(getattr(r, key) for r in changed) for key in ("before", "after"))
        line += f", {changed[0].measure} {before:.3g} before and {after:.3g} after (median)"
    left = len({report.layer for report in reports if not report.changed} - {report.layer for report in changed})
    return line + (f"; {left} left alone (--json says why)" if left else "")


def _change(key: str, before: float | None, after: float) -> str:
    """A metric before and after; a count, or a value that did not change, stands once."""
    if before is None or before == after:
        return f"{key} {after:.0f}" if after.is_integer() else f"{key} {after:.4g}"
    return f"{key} {before:.4g} -> {after:.4g}"


def with_interval(number: float, spread: tuple[float, float] | None) -> str:
    """A number, and its confidence interval if that has two ends."""
    if spread is None or not (isfinite(spread[0]) and isfinite(spread[1])) or spread[0] == spread[1]:
        return f"{number:.4g}"
    return f"{number:.4g} [{spread[0]:.4g}, {spread[1]:.4g}]"


def bits(number: float | None) -> str:
    """Bits per element, or `unknown`."""
    return "unknown" if number is None else f"{number:.3g}"
