"""The table that `qsim search` prints: each group with its choice, then the comparison with uniform recipes."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from qsim_core.cli.console import console, print_below
from qsim_study.search.found import Found, Uniform


def show(found: Found) -> None:
    """Print a search."""
    out = console(rows=True)
    out.print(_groups(found))
    out.print()
    out.print(_compared(found))
    for line in _lines(found):
        print_below(out, line)


def _groups(found: Found) -> Table:
    keys = list(dict.fromkeys(key for group in found.groups for key in group.choice))
    table = Table("group", title=found.result.model, title_justify="left", title_style="bold")
    for key in keys:
        table.add_column(key)
    table.add_column("bits", justify="right")
    table.add_column("sensitivity", justify="right")
    for group in found.groups:
        choice = (group.choice[key] or "none" if key in group.choice else "" for key in keys)
        bits = "" if group.bits is None else f"{group.bits:.4g}"
        table.add_row(group.group, *choice, bits, f"{group.sensitivity:.5f}")
    return table


def _compared(found: Found) -> Table:
    """The found recipe and uniform ones on the data of the evaluation."""
    quantities = list(found.costs)
    table = Table("recipe", *quantities, found.result.metric, "found / this, 95%", "found is", box=None, pad_edge=False)
    table.add_row("unquantized", *("" for _ in quantities), f"{found.result.baseline[found.result.metric]:.5g}", "", "")
    for uniform in found.uniform:
        costs = (amount(uniform.costs[quantity]) for quantity in quantities)
        ratio = "" if uniform.ratio is None else "{:.4f} to {:.4f}".format(*uniform.ratio)
        table.add_row(_name(uniform), *costs, f"{uniform.value:.5g}", ratio, uniform.verdict(found.higher_is_better))
    table.add_row("found", *(amount(found.costs[one]) for one in quantities), f"{found.value:.5g}", "", "")
    return table


def _name(uniform: Uniform) -> str:
    choice = ", ".join(f"{key} {text or 'none'}" for key, text in uniform.choice.items())
    return choice if uniform.fits else f"{choice} (over the budget)"


def _lines(found: Found) -> Iterator[str]:
    said = ", ".join(f"{name} {value:g}" for name, value in found.budget.model_dump(exclude_none=True).items())
    yield f"budget: {said}; {found.runs} recipes were measured on the samples in {found.seconds:.0f} s"
    losses = ", ".join(f"{name} {loss:.5f}" for name, loss in found.losses.items())
    yield f"loss on {found.samples.samples} samples of {found.samples.name}: {losses}"
    for number, one in enumerate(found.rounds, 1):
        yield f"program {number}, around {one.around}: predicted loss {one.predicted:.5f}, measured {one.loss:.5f}"
    yield f"evaluated on {found.result.data.name}: {found.result.protocol}"


def amount(number: float) -> str:
    """A number in four digits, with an exponent if it is large."""
    return f"{number:.4g}"
