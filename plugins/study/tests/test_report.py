"""The report of a study holds all that was found, escapes every text, and loads nothing."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qsim_study import Study, study
from qsim_study.command import study as command
from qsim_study.histograms import Histograms
from qsim_study.report import write_plots, write_report
from qsim_study.report.heat_map import HeatMap
from qsim_study.report.pareto import series

import qsim_core as qsim

TEXT = str(Path(__file__).parents[3] / "README.md")
EVIL = "<script>alert(1)</script>"
SMALL: dict[str, Any] = {
    "name": f"Widths {EVIL}",
    "models": ["opt-tiny", EVIL],
    "recipe": {"evaluate": "perplexity(seqlen=16)"},
    "vary": {"weights": ["int4", "int8"]},
    "data": TEXT,
    "limit": 24,
    "histograms": ["*.0.fc2", "*.no_such"],
    "blame": 2,
}


class Page(HTMLParser):
    """The text of a page, its tags, and the addresses in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses = "", list[str](), list[str]()
        self.data: dict[str, str] = {}
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = dict(attrs).get("id") or tag
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style", "figures"):
            self.text += data
        self.data[self._inside] = self.data.get(self._inside, "") + data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study(SMALL, tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(found: Study, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(found, path)
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_has_every_row(found: Study, page: Page) -> None:
    measured = [row for row in found.rows if "ratio" in row]
    failed = [row for row in found.rows if "failure" in row]

    assert (len(measured), len(failed)) == (2, 2)
    assert all(f"{row['ratio']:#.4g}" in page.text and row["recipe"] in page.text for row in measured)
    assert all(row["failure"] in page.text for row in failed)


def test_the_page_says_what_was_measured(found: Study, page: Page) -> None:
    result = next(entry.result for entry in found.entries.values() if entry.result is not None)

    said = (result.protocol, result.data.name, result.environment.platform, f"torch {torch.__version__}")
    assert [text for text in said if text not in page.text] == []


def test_every_comparison_is_in_the_page(found: Study, page: Page) -> None:
    (one,) = found.comparisons

    assert f"{one.low:#.4g} – {one.high:#.4g}" in page.text


def test_texts_are_escaped(page: Page) -> None:
    assert EVIL in page.text
    assert page.tags.count("script") == 3


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    assert [address for address in page.addresses if not address.startswith("data:")] == []
    assert [word for word in ("url(", "@import", "http:", "https:") if word in page.data["style"]] == []


def test_each_cell_has_a_heat_map_of_each_quantity(page: Page) -> None:
    figures = json.loads(page.data["figures"])

    assert sorted(figures["sites"]) == [f"{cell},{quantity}" for cell in range(2) for quantity in range(4)]
    assert all(len(figure["data"][0]["y"]) == len(figure["data"][0]["z"]) for figure in figures["sites"].values())


def test_the_heat_map_of_predicted_costs_has_those_of_blame(found: Study, page: Page) -> None:
    figure = json.loads(page.data["figures"])["sites"]["0,3"]["data"][0]
    entry = next(entry for entry in found.entries.values() if entry.cell.varied["weights"] == "int4" and entry.blame)

    assert figure["x"] == ["element"]
    assert figure["z"] == [[costs["element"]] for costs in entry.blame.costs.values()]


def test_a_recipe_that_allows_no_prediction_says_so(tmp_path: Path) -> None:
    said = SMALL | {
        "models": ["opt-tiny"],
        "vary": {},
        "recipe": SMALL["recipe"] | {"weights": "int4", "operations": {"softmax": {"output": "bf16"}}},
    }
    write_report(study(said, tmp_path / "study"), path := tmp_path / "report.html")

    assert "no predicted cost of sites: blame tells what" in Page(path.read_text(encoding="utf-8")).text


def test_a_pattern_that_names_no_site_is_a_warning(page: Page) -> None:
    assert "histograms: no site of opt-tiny is named *.no_such" in page.text


def test_a_histogram_counts_every_value_of_the_weight(found: Study) -> None:
    entry = next(entry for entry in found.entries.values() if entry.cell.varied["weights"] == "int4" and entry.result)

    (one,) = [histogram for histogram in entry.histograms if histogram.role == "weight"]

    assert sum(one.counts) + one.below + one.above == 256 * 1024
    assert one.grid == [float(value) for value in range(-7, 8)]


def observed(quantizer: str, x: torch.Tensor) -> Any:
    """The histogram of the input of one layer."""
    layer = torch.nn.Linear(x.shape[-1], 2, bias=False)
    watch = Histograms(["*"])
    with qsim.simulate(torch.nn.Sequential(layer), activations=quantizer, example=x) as simulation:
        simulation.audit(observer=watch)
    return watch.found["0", "input"]


def test_values_with_a_zero_point_lie_on_the_codes() -> None:
    one = observed("scaled(uint4, token, symmetric=false)", torch.tensor([[0.0, 1.0, 15.0], [-15.0, 0.0, 0.0]]))

    assert one.grid == [float(value) for value in range(16)]
    assert (sum(one.counts), one.below, one.above) == (6, 0, 0)


def test_values_without_a_scale_are_counted_as_they_are() -> None:
    one = observed("cast(e2m1)", torch.tensor([[0.5, 1.0, 3.0]]))

    assert not one.scaled
    assert one.grid == [0.5, 1.0, 1.5, 2.0, 3.0]


def row(cost: float, ratio: float, **more: Any) -> dict[str, Any]:
    plain = {"key": f"{cost} {ratio}", "model": "m", "recipe": "r", "metric": "accuracy", "higher_is_better": False}
    return plain | {"ratio": ratio, "ratio_low": None, "ratio_high": None, "bits_per_weight": cost} | more


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row(4, 1.2), row(5, 1.3), row(8, 1.0), row(8, 1.1)]

    (one,) = series(rows, "bits_per_weight")

    assert [(point.cost, point.ratio) for point in one.front] == [(4, 1.2), (8, 1.0)]


def test_the_front_of_a_metric_that_should_be_high() -> None:
    rows = [row(cost, ratio, higher_is_better=True) for cost, ratio in ((4, 0.8), (5, 0.7), (8, 1.0))]

    (one,) = series(rows, "bits_per_weight")

    assert [point.ratio for point in one.front] == [0.8, 1.0]


def test_a_cell_without_a_finite_ratio_has_no_point() -> None:
    assert series([row(4, float("nan")), row(8, float("inf"))], "bits_per_weight") == []


def test_points_of_equal_cost_stand_side_by_side() -> None:
    (one,) = series([row(4, 1.2), row(4, 1.1), row(8, 1.0)], "bits_per_weight")

    places = [point.drawn_at for point in one.points]
    assert len(set(places)) == 3
    assert places == pytest.approx([4, 4, 8], abs=0.05)


@pytest.mark.parametrize(
    ("sites", "labels"),
    [
        (["model.layers.0.fc1", "model.layers.10.fc1", "lm_head"], ["0.fc1", "10.fc1", "lm_head"]),
        (["encoder.layers.0.fc", "decoder.layers.0.fc"], ["encoder.layers.0.fc", "decoder.layers.0.fc"]),
    ],
)
def test_labels_of_sites_are_short_and_different(sites: list[str], labels: list[str]) -> None:
    assert HeatMap(sites, [], []).labels == labels


def test_pictures_are_written_as_svg_and_png(found: Study, tmp_path: Path) -> None:
    written = write_plots(found, tmp_path / "plots")

    assert {path.name for path in written} >= {"accuracy-against-bits-per-weight.svg", "sites-of-opt-tiny.png"}
    assert all(path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r") for path in written)


def test_pictures_without_matplotlib(found: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(qsim.QsimError, match=r"pip install 'qsim-study\[plots\]'"):
        write_plots(found, tmp_path)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    small = ["opt-tiny", "--vary", "weights=int4", "--set", "perplexity.seqlen=16", "--data", TEXT]
    return [*small, "--limit", "2", "--output", str(tmp_path / "out"), "--quiet"]


def test_the_command_writes_the_page_again_without_computing(arguments: list[str], tmp_path: Path) -> None:
    first = CliRunner().invoke(command, [*arguments, "--no-report"], catch_exceptions=False)
    assert first.exit_code == 0
    assert not (tmp_path / "out" / "report.html").exists()
    cells = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()}

    CliRunner().invoke(command, arguments, catch_exceptions=False)

    assert (tmp_path / "out" / "report.html").exists()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()} == cells
