"""The page: one HTML file that holds everything it shows."""

from __future__ import annotations

import json
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from qsim_core.files import writing
from qsim_study.report import facts
from qsim_study.report.charts import Chart, charts
from qsim_study.report.tables import cells_table, comparisons_table, failures_table, table
from qsim_study.study_run import Study

HERE = Path(__file__).parent
TIES = "A rank with = is shared: these samples do not tell its recipes apart from all better or equal ones (Holm, 5%)."
SORTED = "A click on a header sorts."


def write_report(study: Study, path: Path) -> None:
    """Write the report of a study as one HTML file, which a browser shows offline. Raises `QsimError`."""
    with writing(path) as file:
        file.write(_page(study).encode())


def _page(study: Study) -> str:
    from plotly.offline import get_plotlyjs

    drawn = {chart.name: chart for chart in charts(study)}
    figures = {name: chart.figures for name, chart in drawn.items()}
    sections = [
        _section("Warnings", _list(facts.warnings(study))),
        *(_chart(drawn[name]) for name in ("pareto",) if name in drawn),
        _section("Cells", cells_table(study), f"{TIES} {SORTED}"),
        _section("Failed", failures_table(study)),
        *(_chart(chart) for name, chart in drawn.items() if name != "pareto"),
        _section("What was measured", _measured(study)),
        _section("Comparisons", comparisons_table(study), f"Recipes of one model on the same samples. {SORTED}"),
    ]
    title = escape(study.name)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
            f"<title>{title}</title>\n<style>\n{_file('page.css')}</style>\n</head>\n<body>\n<main>",
            f'<header><h1>{title}</h1><p class="summary">{escape(facts.summary(study))}</p></header>',
            *sections,
            "</main>",
            f'<script type="application/json" id="figures">{_embedded(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>\n<script>\n{_file('page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _section(title: str, content: str, caption: str = "") -> str:
    """A section; nothing where it has no content."""
    said = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>" if content else ""


def _chart(chart: Chart) -> str:
    """The place of a chart, under its menus; a menu of one choice is left out."""
    menus = "".join(_menu(name, choices) for name, choices in chart.menus.items())
    drawing = (
        f'{menus}<div class="chart" data-chart="{chart.name}" role="img" aria-label="{escape(chart.title)}"></div>'
        '<p class="caption" hidden>There is nothing for this choice.</p>'
    )
    return _section(chart.title, f'<div class="chosen" id="{chart.name}">{drawing}</div>', chart.caption)


def _menu(name: str, choices: list[str]) -> str:
    options = "".join(f'<option value="{place}">{escape(choice)}</option>' for place, choice in enumerate(choices))
    hidden = " hidden" if len(choices) < 2 else ""
    return f'<label{hidden}><span>{escape(name)}</span> <select name="{escape(name)}">{options}</select></label>'


def _measured(study: Study) -> str:
    titles = ("model", "protocol", "data", "samples")
    wanted = [(title, lambda row, place=place: row[place], "") for place, title in enumerate(titles)]
    around = facts.circumstances(study)
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape('; '.join(said))}</dd>" for name, said in around.items())
    return table("measured", wanted, facts.measured(study)) + f"<dl>{terms}</dl>"


def _list(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element around it; a number that JSON has not is null."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
