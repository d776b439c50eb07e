"""The table that `qsim blame` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from qsim_core.cli.console import console, print_below
from qsim_study.blame.parts import PARTS
from qsim_study.blame.report import Blame, Cost, SiteBlame

SHOWN = 12
"""The sites that are listed; those that were measured are listed in any case."""
MOST_LINES = 6
"""The notes that are printed; JSON has all."""


def show(found: Blame) -> None:
    """Print an answer."""
    out = console(rows=True)
    out.print(_table(found))
    for line in _lines(found):
        print_below(out, line)


def _table(found: Blame) -> Table:
    used = [part for part in PARTS if any(part in site.parts for site in found.sites)]
    left_out = any(site.left_out is not None for site in found.sites)
    table = Table("site", title=found.model, title_justify="left", title_style="bold")
    for heading in ("predicted", *(used if len(used) > 1 else ()), "fisher"):
        table.add_column(heading, justify="right")
    for heading in ("alone", *(["left out"] if left_out else ())) if found.whole is not None else ():
        table.add_column(f"{found.metric}, {heading}", justify="right")
    for row in _shown(found):
        parts = [f"{row.parts.get(part, 0.0):+.2g}" for part in used] if len(used) > 1 else []
        measured = [_cost(row.alone), *([_cost(row.left_out)] if left_out else [])] if found.whole is not None else []
        predicted = f"{row.predicted:+.2g} ± {row.error:.1g}"
        table.add_row(row.site, predicted, *parts, f"{row.fisher:.2g}", *measured)
    return table


def _shown(found: Blame) -> list[SiteBlame]:
    return found.sites[: max(SHOWN, len(found.verified))]


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return ""
    interval = "" if cost.interval is None else " [{:+.2g}, {:+.2g}]".format(*cost.interval)
    return f"{cost.value:+.2g}{interval}"


def _lines(found: Blame) -> Iterator[str]:
    if (more := len(found.sites) - len(_shown(found))) > 0:
        yield f"{more} more sites with a lower predicted cost (--json has them)"
    yield (
        f"predicted: the change of the loss with its standard error, from one gradient pass half-way to the recipe, "
        f"over {found.samples} samples; all sites add up to {found.predicted:+.2g}"
    )
    yield "fisher: the divergence of the outputs that a site causes alone, in nats for each label; labels have no part"
    if found.whole is not None:
        yield (
            f"alone: the amount by which {found.metric} gets worse under the recipe at this site only; the whole "
            f"recipe costs {_cost(found.whole)}; in brackets: 95% confidence intervals over the same samples"
        )
        yield f"{_tau(found.tau, len(found.verified))}, and {_value(found.tau_fisher)} of the Fisher terms"
    if any(site.left_out is not None for site in found.sites):
        yield "left out: the amount by which the whole recipe gets better without this site"
        yield f"of what is left out: {_tau(found.tau_left_out, len(found.verified))}"
    yield from found.notes[:MOST_LINES]
    if (more := len(found.notes) - MOST_LINES) > 0:
        yield f"{more} more notes (--json has them)"


def _tau(tau: float | None, many: int) -> str:
    return f"Kendall's tau of predicted and measured costs is {_value(tau)} over {many} sites"


def _value(tau: float | None) -> str:
    return "unknown" if tau is None else f"{tau:.2f}"
