"""The charts of the page as plain data for plotly.js.

A colour is the name of a variable of the style sheet, like `var(--ink)`; the page's script puts its value there, for
light and for dark. A chart has menus; each choice in all menus has a figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate, islice
from typing import Any

from qsim_core import Recipe
from qsim_study.cell import Entry
from qsim_study.histograms import Histogram
from qsim_study.report.heat_map import BLAME, QUANTITIES, HeatMap, Quantity, blame_map, ends, heat_map
from qsim_study.report.pareto import Series, costs, series, spans_decades, titles
from qsim_study.study_run import Study

COLOURS = 6
"""Colours of series in the style sheet; more series repeat them with other symbols."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
HEAT = ("var(--heat-0)", "var(--heat-1)", "var(--heat-2)")
"""From harmless to bad."""
BAR = {"lenmode": "pixels", "len": 180, "y": 1, "yanchor": "top"}
MOST = 300
"""Cells of which the page has heat maps and histograms; each takes some 20 kB or more."""
ROW = 22
"""Pixels of a row of the heat map."""
MANY_TICKS = 100
"""Values of a format from which on their ticks are thin, so that they stay apart on a narrow screen."""
WIDTH = 60
"""Characters of a line of a hover text."""


@dataclass
class Chart:
    """Figures, one of which is shown: the key of a figure is a place in each menu, as in `0,2`."""

    name: str
    title: str
    caption: str
    menus: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


def charts(study: Study) -> Iterator[Chart]:
    """All charts for which the study has data."""
    yield from pareto_chart(study)
    yield from heat_chart(study)
    yield from histogram_chart(study)


def pareto_chart(study: Study) -> Iterator[Chart]:
    """The metric against each cost, a series for each model."""
    rows = study.rows
    named = {cost: found for cost in costs(rows) if (found := series(rows, cost))}
    if not named:
        return
    shown = max(sum(len(one.points) for one in found) for found in named.values())
    lacking = sum("ratio" in row for row in rows) - shown
    caption = (
        "Lines and filled marks: the recipes of a model that no other one beats in both. Bars: 95% intervals of the "
        "ratio. The front is of the estimates; the intervals say how sure it is. "
        "Marks of equal cost stand side by side."
    )
    if lacking:
        caption += f" {lacking} cells have no finite ratio or no cost, and are in the table alone."
    chart = Chart("pareto", "Accuracy against cost", caption, {"cost": [_words(cost) for cost in named]})
    for place, (cost, found) in enumerate(named.items()):
        chart.figures[str(place)] = _pareto(_words(cost), found, study.entries)
    yield chart


def _pareto(cost: str, found: list[Series], entries: Mapping[str, Entry]) -> dict[str, Any]:
    axis, names = titles(found)
    traces: list[dict[str, Any]] = []
    for place, (one, name) in enumerate(zip(found, names, strict=True)):
        colour = f"var(--series-{place % COLOURS})"
        symbol = SYMBOLS[(place + place // COLOURS) % len(SYMBOLS)]
        front = one.front
        for points, filled in ((front, True), ([point for point in one.points if point not in front], False)):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if filled else "markers",
                    "name": escape(name),
                    "legendgroup": str(place),
                    "showlegend": filled,
                    "x": [point.drawn_at for point in points],
                    "y": [point.ratio for point in points],
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": [point.high - point.ratio or None for point in points],
                        "arrayminus": [point.ratio - point.low or None for point in points],
                        "color": colour,
                        "thickness": 1,
                        "width": 3,
                    },
                    "line": {"color": colour, "width": 1.5, "shape": "hv"},
                    "marker": {"color": colour, "size": 9, "symbol": symbol if filled else f"{symbol}-open"},
                    "text": [_hover(point.recipe, entries[point.key]) for point in points],
                    "customdata": [point.cost for point in points],
                    "hovertemplate": f"<b>{escape(one.model)}</b><br>%{{text}}<br>{escape(cost)}: "
                    "%{customdata:.4~g}<br>ratio: %{y:.5~g}<extra></extra>",
                }
            )
    layout = {
        "height": 440,
        "xaxis": {"title": {"text": escape(cost)}},
        "yaxis": {"title": {"text": escape(axis)}, "type": "log" if spans_decades(found) else "linear"},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}


def _hover(label: str, entry: Entry) -> str:
    """The label of a cell, its recipe as far as it says something, and the metric."""
    plain, recipe = Recipe().record(), entry.cell.recipe
    said = [f"{key}: {value}" for key, value in recipe.items() if value and value != plain.get(key)]
    result = entry.result
    assert result is not None
    said.append(f"{result.metric}: {result.simulated[result.metric]:.5g}, was {result.baseline[result.metric]:.5g}")
    lines = [label, *dict.fromkeys(said)]
    return "<br>".join(escape(part) for line in lines for part in textwrap.wrap(line, WIDTH))


def heat_chart(study: Study) -> Iterator[Chart]:
    """The error of each site and role, for the cell and the quantity that are chosen."""
    measured = {key: entry for key, entry in study.entries.items() if entry.result is not None}
    if not measured:
        return
    shown = dict(islice(measured.items(), MOST))
    caption = "Measured on one batch. The darker or brighter the colour, the worse; it means the same in all cells."
    found: dict[Quantity, dict[int, HeatMap]] = {quantity: {} for quantity in QUANTITIES}
    for cell, entry in enumerate(shown.values()):
        assert entry.result is not None
        for quantity in QUANTITIES:
            found[quantity][cell] = heat_map(entry.result.audit, quantity)
        if entry.blame is not None and entry.blame.costs:
            found.setdefault(BLAME, {})[cell] = blame_map(entry.blame)
    if BLAME in found:
        caption += " The predicted cost is that of the gradient pass of qsim blame, in the loss; below zero is a gain."
    menus = {"cell": _labels(study, shown), "quantity": [one.title for one in found]}
    chart = Chart("sites", "Sites", caption + _left_out(len(measured)), menus)
    for second, (quantity, maps) in enumerate(found.items()):
        both = ends(list(maps.values()))
        for first, one in maps.items():
            chart.figures[f"{first},{second}"] = _heat(one, quantity, both)
    yield chart


def _heat(found: HeatMap, quantity: Quantity, both: tuple[float, float] | None) -> dict[str, Any]:
    colours = HEAT[::-1] if quantity.higher_is_better else HEAT
    sites = [escape(site) for site in found.sites]
    trace = {
        "type": "heatmap",
        "x": found.roles,
        "y": sites,
        "z": found.values,
        "texttemplate": f"%{{z:{quantity.digits}}}",
        "textfont": {"size": 11},
        "hovertemplate": f"%{{y}}<br>%{{x}}: %{{z:.4~g}} {quantity.unit}<extra></extra>",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "zmin": both[0] if both else 0,
        "zmax": both[1] if both else 1,
        "colorscale": [[place / 2, colour] for place, colour in enumerate(colours)],
        "colorbar": {"title": {"text": quantity.unit}, "thickness": 10, "outlinewidth": 0, **BAR},
    }
    layout = {
        "height": 60 + ROW * len(found.sites),
        "margin": {"l": 48, "r": 16, "t": 52, "b": 8},
        "xaxis": {"side": "top", "showgrid": False, "zeroline": False, "type": "category", "fixedrange": True},
        "yaxis": {
            "autorange": "reversed",
            "showgrid": False,
            "type": "category",
            "tickvals": sites,
            "ticktext": [escape(label) for label in found.labels],
            "tickfont": {"size": 11},
            "fixedrange": True,
        },
    }
    return {"data": [trace], "layout": layout}


def histogram_chart(study: Study) -> Iterator[Chart]:
    """The values at the sites that the study asked for, with the values of the number format."""
    counted = {key: entry for key, entry in study.entries.items() if entry.histograms}
    if not counted:
        return
    entries = dict(islice(counted.items(), MOST))
    places = list(dict.fromkeys((one.site, one.role) for entry in entries.values() for one in entry.histograms))
    caption = (
        "Values before they are quantized, of one batch. Ticks above: the values of the number format. A value outside "
        "of the bins is counted in the title." + _left_out(len(counted))
    )
    menus = {"cell": _labels(study, entries), "site": [f"{site} {role}" for site, role in places]}
    chart = Chart("values", "Values", caption, menus)
    for first, entry in enumerate(entries.values()):
        for one in entry.histograms:
            chart.figures[f"{first},{places.index((one.site, one.role))}"] = _histogram(one)
    yield chart


def _histogram(found: Histogram) -> dict[str, Any]:
    width = (found.high - found.low) / len(found.counts)
    starts = list(accumulate(found.counts, lambda place, _: place + width, initial=found.low + width / 2))
    total = max(sum(found.counts) + found.below + found.above, 1)
    bars = {
        "type": "bar",
        "x": starts[:-1],
        "y": [count / total or None for count in found.counts],
        "width": width,
        "marker": {"color": "var(--series-0)", "line": {"width": 0}},
        "hovertemplate": "%{x:.4~g}: %{y:.3~g} of all<extra></extra>",
    }
    width_of_ticks = 1 if len(found.grid) < MANY_TICKS else 0.4
    ticks = {
        "type": "scatter",
        "mode": "markers",
        "x": found.grid,
        "y": [0] * len(found.grid),
        "yaxis": "y2",
        "marker": {"symbol": "line-ns", "size": 16, "line": {"width": width_of_ticks, "color": "var(--series-1)"}},
        "hovertemplate": "%{x:.6~g}<extra>value of the format</extra>",
    }
    outside = found.below + found.above
    title = f"{found.quantizer}, {found.role} of {found.site}" + (f"; {outside} values outside" if outside else "")
    layout = {
        "height": 360,
        "title": {"text": "<br>".join(map(escape, textwrap.wrap(title, WIDTH))), "font": {"size": 13}},
        "bargap": 0,
        "xaxis": {
            "title": {"text": "value in units of its scale" if found.scaled else "value"},
            "range": [found.low, found.high],
            "anchor": "y",
        },
        "yaxis": {
            "title": {"text": "share of values"},
            "type": "log",
            "dtick": 1,
            "tickfont": {"size": 11},
            "exponentformat": "power",
            "domain": [0, 0.86],
        },
        "yaxis2": {"domain": [0.9, 1], "visible": False, "range": [-1, 1], "fixedrange": True},
        "showlegend": False,
    }
    return {"data": [bars, ticks], "layout": layout}


def _left_out(many: int) -> str:
    return f" These are the first {MOST} of {many} cells." if many > MOST else ""


def _labels(study: Study, keys: Mapping[str, Any]) -> list[str]:
    return [study.cells[key].label or "the recipe alone" for key in keys]


def _words(column: str) -> str:
    """The name of a column in words."""
    return column.replace("_", " ")
