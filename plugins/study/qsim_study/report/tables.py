"""The tables of the page. A click on a header sorts them; a cell says its number to the script as `data-value`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any

from qsim_study.comparison import Comparison
from qsim_study.study_run import Study
from qsim_study.table import SPREAD, Row, columns

MOST = 1000
"""Comparisons that the page shows; those with the smallest p-values."""
LONG = 32
"""Characters of the longest text that stays on one line."""
Column = tuple[str, Callable[[Any], Any], str]
"""A header, the function that takes the value from a row, and the format of numbers; empty for text."""


def table(name: str, wanted: Iterable[Column], rows: Iterable[Any]) -> str:
    """A table whose headers sort it."""
    wanted = list(wanted)
    head = "".join(
        f'<th scope="col" class="{"number" if digits else "text"}"><button type="button">{escape(title)}</button></th>'
        for title, _, digits in wanted
    )
    body = "".join(f"<tr>{''.join(_cells(wanted, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table id="{name}" class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(wanted: list[Column], row: Any) -> Iterator[str]:
    for _, value_of, digits in wanted:
        value = value_of(row)
        if digits and value is not None:
            number, text = value if isinstance(value, tuple) else (value, f"{value:{digits}}")
            yield f'<td class="number" data-value="{number}">{escape(text)}</td>'
        else:
            text = "" if value is None else str(value)
            long = ' class="long"' if len(text) > LONG else ""
            yield f"<td{long}>{escape(text)}</td>"


def cells_table(study: Study) -> str:
    """All cells with a result, by model and rank."""
    measured = [row for row in study.rows if "ratio" in row]
    models = list(dict.fromkeys(row["model"] for row in measured))
    measured.sort(key=lambda row: (models.index(row["model"]), row["rank"] or len(measured)))
    wanted = [
        _named("model"),
        ("rank", _rank, "d"),
        ("recipe", lambda row: row["recipe"] or "the recipe alone", ""),
        _named("metric"),
        _named("baseline", "#.5g"),
        _named("simulated", "#.5g"),
        _named("ratio", "#.4g"),
        ("95% interval", _interval, ".4g"),
        _named("bits_per_weight", "#.3g"),
        _named("bits_per_activation", "#.3g"),
        *(_named(name, "#.3g") for name in columns(measured) if _is_total(name) or name.startswith(SPREAD)),
        _named("samples", "d"),
    ]
    return table("cells", wanted, measured)


def _is_total(name: str) -> bool:
    """Tell if a column has the whole cost on hardware; its parts are in the other tables."""
    return " on " in name and "bound_by" not in name.replace(" ", "_")


def _named(name: str, digits: str = "") -> Column:
    return name.replace("_", " "), lambda row: row.get(name), digits


def _rank(row: Row) -> tuple[int, str] | None:
    return None if row["rank"] is None else (row["rank"], f"{row['rank']}{'=' if row['tied'] else ''}")


def _interval(row: Row) -> tuple[float, str] | None:
    """The interval; its width is what sorts it."""
    low, high = row["ratio_low"], row["ratio_high"]
    return None if low is None or high is None else (high - low, _ends(low, high))


def _ends(low: float, high: float) -> str:
    return f"{low:#.4g} – {high:#.4g}"


def failures_table(study: Study) -> str:
    """Cells without a result, and the reasons."""
    failed = [row for row in study.rows if "failure" in row]
    wanted = [_named("model"), ("recipe", lambda row: row["recipe"] or "the recipe alone", ""), _named("failure")]
    return table("failed", wanted, failed) if failed else ""


def comparisons_table(study: Study) -> str:
    """The comparisons of recipes on one model, the surest first."""
    wanted: list[Column] = [
        ("model", lambda one: study.cells[one.first].model, ""),
        ("first", lambda one: study.cells[one.first].recipe_label, ""),
        ("second", lambda one: study.cells[one.second].recipe_label, ""),
        ("first / second", lambda one: one.ratio, "#.4g"),
        ("95% interval", lambda one: (one.high - one.low, _ends(one.low, one.high)), ".4g"),
        ("p, corrected", lambda one: one.p, ".2g"),
        ("verdict", lambda one: _verdict(study, one), ""),
    ]
    found = sorted(study.comparisons, key=lambda one: one.p)
    if not found:
        return ""
    left = len(found) - MOST
    more = f"<p>{left} more comparisons, with larger p-values, are not shown.</p>" if left > 0 else ""
    return table("comparisons", wanted, found[:MOST]) + more


def _verdict(study: Study, one: Comparison) -> str:
    if not one.decided:
        return "tie"
    return "first is better" if (one.ratio > 1) == study.entries[one.first].higher_is_better else "second is better"
