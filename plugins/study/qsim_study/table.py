"""The rows of a study: plain dictionaries, one for each cell, and the table that the command line prints of them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from qsim_core.cli.console import console, print_below
from qsim_core.cli.result_table import bits, with_interval
from qsim_core.errors import QsimError
from qsim_core.files import writing
from qsim_study.cell import Cell, Entry
from qsim_study.comparison import Comparison, ranks, spreads

Row = dict[str, Any]
SHOWN_WARNINGS = 4
"""Warnings that are printed; the others are counted."""
SPREAD = "spread over "
"""The beginning of the name of a column with standard deviations."""


def rows(cells: Mapping[str, Cell], entries: Mapping[str, Entry], compared: list[Comparison]) -> list[Row]:
    """One row for each cell, in the study's order; of a cell that is missing or has failed, its reason."""
    ranked, spread = ranks(entries, compared), spreads(entries)
    found = []
    for key, cell in cells.items():
        entry = entries.get(key)
        row: Row = {"key": key, "model": cell.model, "recipe": cell.recipe_label, **_values(cell)}
        if entry is None or entry.result is None:
            found.append(row | {"failure": "missing" if entry is None else entry.failure})
            continue
        result = entry.result
        interval = result.intervals.get(result.metric)
        rank, shared = ranked.get(key, (None, False))
        row |= {
            "model": result.model,
            "metric": result.metric,
            "baseline": result.baseline[result.metric],
            "simulated": result.simulated[result.metric],
            "ratio": result.ratio,
            "ratio_low": None if interval is None else interval.ratio[0],
            "ratio_high": None if interval is None else interval.ratio[1],
            "rank": rank,
            "tied": shared,
            "higher_is_better": entry.higher_is_better,
            "samples": result.samples,
            "bits_per_weight": result.audit.bits_per_weight,
            "bits_per_activation": result.audit.bits_per_activation,
            "seconds": entry.seconds,
            "warnings": "; ".join(result.warnings),
        }
        row |= {SPREAD + one.what: one.deviation for one in spread.get(key, ())}
        row |= {
            f"{quantity} on {hardware}": amount
            for hardware, cost in result.audit.costs.items()
            for quantity, amount in cost.totals.items()
        }
        found.append(row)
    return found


def doubts(entries: Iterable[Entry]) -> list[str]:
    """Lines about cells that were not computed alike: from other weights of a model, or in another environment."""
    results = [entry.result for entry in entries if entry.result is not None]
    weights = {(result.model, result.environment.dtype, result.weights) for result in results}
    changed = Counter((model, dtype) for model, dtype, _ in weights)
    lines = [
        f"cells of {model} had different weights: the model changed between them; they are not compared"
        for (model, _), many in changed.items()
        if many > 1
    ]
    for what in ("threads", "platform"):
        seen = sorted({str(getattr(result.environment, what)) for result in results})
        if len(seen) > 1:
            lines.append(f"cells had different {what} ({', '.join(seen)}): sums may be taken in another order")
    return lines


def _values(cell: Cell) -> Row:
    """The varied values under names of their own."""
    return {f"vary {key}": value for key, value in cell.varied.items() if key not in ("model", "recipe")}


def columns(found: list[Row]) -> list[str]:
    """The names of all columns, in the order in which rows have them."""
    return list(dict.fromkeys(name for row in found for name in row))


def write_csv(found: list[Row], path: Path) -> None:
    """Write rows as CSV. Raises `QsimError`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns(found))
    writer.writeheader()
    writer.writerows(found)
    with writing(path) as file:
        file.write(text.getvalue().encode())


def write_parquet(found: list[Row], path: Path) -> None:
    """Write rows as Parquet. Raises `QsimError` without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise QsimError("Parquet needs pyarrow; pip install 'qsim-study[tables]'") from None
    names = columns(found)
    with writing(path) as file:
        pq.write_table(pa.table({name: [row.get(name) for row in found] for name in names}), file)


def show(found: list[Row], notes: list[str]) -> None:
    """Print a table for each model: recipes by rank, ties said, then what failed."""
    out = console(rows=True)
    models = list(dict.fromkeys(row["model"] for row in found if "failure" not in row))
    for model in models:
        out.print(_table(str(model), [row for row in found if row["model"] == model]))
    for line in (*_lines(found), *notes):
        print_below(out, line)


def _table(model: str, found: list[Row]) -> Table:
    measured = [row for row in found if "ratio" in row]
    costs = [name for name in columns(measured) if " on " in name]
    over = [name for name in columns(measured) if name.startswith(SPREAD)]
    metric = measured[0]["metric"] if measured else "metric"
    table = Table(title=model, title_justify="left", title_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("recipe", overflow="fold")
    for name in (metric, "ratio", "bits per weight", "bits per activation", *over, *costs, "seconds"):
        table.add_column(name, justify="right")
    for row in sorted(found, key=lambda row: row.get("rank") or len(found) + 1):
        if "failure" in row:
            continue
        ends = None if row["ratio_low"] is None else (row["ratio_low"], row["ratio_high"])
        rank = "" if row["rank"] is None else f"{row['rank']}{'=' if row['tied'] else ''}"
        table.add_row(
            rank,
            row["recipe"],
            f"{row['simulated']:.5g}",
            with_interval(row["ratio"], ends),
            bits(row["bits_per_weight"]),
            bits(row["bits_per_activation"]),
            *(f"{row[name]:.3g}" if name in row else "" for name in (*over, *costs)),
            f"{row['seconds']:.1f}",
        )
    return table


def _place(row: Row) -> tuple[float, float]:
    """The rank, then the metric, the better one first."""
    return row["rank"] or float("inf"), -row["simulated"] if row["higher_is_better"] else row["simulated"]


def _lines(found: list[Row]) -> Iterator[str]:
    failed = [row for row in found if "failure" in row]
    for row in failed:
        yield f"failed: {row['model']}, {row['recipe']}: {row['failure']}"
    doubts = Counter(row["warnings"] for row in found if row.get("warnings"))
    for text, many in doubts.most_common(SHOWN_WARNINGS):
        yield f"warning ({many} cell{'s' if many > 1 else ''}): {text}"
    if len(doubts) > SHOWN_WARNINGS:
        yield f"{len(doubts) - SHOWN_WARNINGS} other warnings stand in the rows (--json)"
    if any(row.get("tied") for row in found):
        yield "n=: these samples do not tell the recipes of this rank apart from all better or equal ones (Holm, 5%)"
