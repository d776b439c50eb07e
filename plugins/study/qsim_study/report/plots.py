"""Pictures for slides, by matplotlib: accuracy against cost, and the heat map of each model's best recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsim_core import QsimError
from qsim_core.files import make_work_dir, writing
from qsim_study.report.heat_map import QUANTITIES, heat_map
from qsim_study.report.pareto import costs, series, spans_decades, titles
from qsim_study.study_run import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#008a65", "#b4548d", "#a87300", "#4a4e57")
MARKERS = "osD^Pv"
KINDS = ("svg", "png")


def check_plots() -> None:
    """Raise `QsimError` if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise QsimError("pictures need matplotlib; pip install 'qsim-study[plots]'") from None


def write_plots(study: Study, directory: Path) -> list[Path]:
    """Write each picture as SVG and PNG, and give their paths. Raises `QsimError`."""
    check_plots()
    make_work_dir(directory)
    written = []
    for name, figure in _figures(study):
        for kind in KINDS:
            path = directory / f"{_slug(name)}.{kind}"
            with writing(path) as file:
                figure.savefig(file, format=kind, dpi=200, bbox_inches="tight")
            written.append(path)
    return written


def _figures(study: Study) -> Iterator[tuple[str, Figure]]:
    rows = study.rows
    for cost in costs(rows):
        if found := series(rows, cost):
            yield f"accuracy against {cost}", _pareto(cost.replace("_", " "), found)
    measured = sorted((row for row in rows if "ratio" in row), key=lambda row: row["rank"] or len(rows))
    for row in {row["model"]: row for row in reversed(measured)}.values():
        yield f"sites of {row['model']}", _heat(study, row["key"])


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _pareto(cost: str, found: Any) -> Figure:
    figure, axes = _axes(7, 4.2)
    axis, names = titles(found)
    for place, (one, name) in enumerate(zip(found, names, strict=True)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        points, front = one.points, one.front
        axes.errorbar(
            [point.drawn_at for point in points],
            [point.ratio for point in points],
            [[point.ratio - point.low for point in points], [point.high - point.ratio for point in points]],
            fmt=marker,
            color=colour,
            markerfacecolor="none",
            elinewidth=1,
            capsize=2,
        )
        places, ratios = [point.drawn_at for point in front], [point.ratio for point in front]
        axes.step(places, ratios, where="post", color=colour, linewidth=1.2, marker=marker, label=_plain(name))
    axes.set_xlabel(_plain(cost))
    axes.set_ylabel(_plain(axis))
    if spans_decades(found):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _heat(study: Study, key: str) -> Figure:
    result, quantity = study.entries[key].result, QUANTITIES[0]
    assert result is not None
    found = heat_map(result.audit, quantity)
    figure, axes = _axes(2.5 + 0.9 * len(found.roles), 1 + 0.22 * len(found.sites))
    values = [[float("nan") if value is None else value for value in row] for row in found.values]
    image = axes.imshow(values, aspect="auto", cmap="Oranges_r")
    axes.set_xticks(range(len(found.roles)), found.roles)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(found.sites)), [_plain(label) for label in found.labels], fontsize=8)
    axes.set_title(_plain(f"{quantity.title} in {quantity.unit}: {study.cells[key].label or result.model}"), fontsize=9)
    figure.colorbar(image, shrink=0.6)
    return figure


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _slug(name: str) -> str:
    """A name for a file, of letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-100:]
