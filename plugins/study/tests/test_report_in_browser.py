"""A browser shows the report: charts have their marks, tables sort, nothing is requested, in light and in dark."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qsim_study import Study, study
from qsim_study.report import write_report

pytest.importorskip("selenium", reason="selenium is not installed")
if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import text_to_be_present_in_element
from selenium.webdriver.support.wait import WebDriverWait

TEXT = str(Path(__file__).parents[3] / "README.md")
SMALL: dict[str, Any] = {
    "name": "Widths",
    "models": ["opt-tiny", "missing/model"],
    "recipe": {"evaluate": "perplexity(seqlen=16)"},
    "vary": {"weights": ["int4", "int8"]},
    "data": TEXT,
    "limit": 24,
    "histograms": ["*.0.fc2"],
}
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("study")
    found = study(SMALL, folder)
    write_report(found, folder / "report.html")
    return found, folder / "report.html"


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=SCHEMES)
def browser(request: pytest.FixtureRequest, started: Any, report: tuple[Study, Path]) -> Any:
    """The page, opened in one of the two colour schemes, 1280 pixels wide."""
    prefer(started, request.param)
    width(started, 1280)
    started.get(report[1].as_uri())
    return started


def prefer(browser: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def width(browser: Any, pixels: int) -> None:
    size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def count(browser: Any, selector: str, until: int) -> int:
    """The number of elements that a selector finds, as soon as it is `until`; plotly draws after the page is loaded."""
    end = time.monotonic() + 10
    while True:
        found: int = browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)
        if found == until or time.monotonic() > end:
            return found
        time.sleep(0.05)


def column(browser: Any, table: str, title: str) -> list[str]:
    """The texts of a column, from the top."""
    script = """
        const table = document.getElementById(arguments[0]);
        const place = [...table.tHead.rows[0].cells].findIndex((one) => one.textContent === arguments[1]);
        return [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
    """
    found: list[str] = browser.execute_script(script, table, title)
    return found


def click(browser: Any, table: str, title: str) -> None:
    browser.find_element("xpath", f"//table[@id='{table}']//button[text()='{title}']").click()


def choose(browser: Any, chart: str, menu: str, place: int) -> None:
    script = """
        const menu = document.querySelector(`#${arguments[0]} select[name=${arguments[1]}]`);
        menu.value = arguments[2];
        menu.dispatchEvent(new Event("change", { bubbles: true }));
    """
    browser.execute_script(script, chart, menu, str(place))


def test_every_cell_has_a_mark_and_an_interval_in_the_pareto_chart(browser: Any) -> None:
    assert count(browser, "#pareto .scatterlayer .points path", 2) == 2
    assert count(browser, "#pareto .scatterlayer path.yerror", 2) == 2


def test_every_site_has_its_number_in_the_heat_map(browser: Any, report: tuple[Study, Path]) -> None:
    result = next(entry.result for entry in report[0].entries.values() if entry.result is not None)
    sites = [site for site in result.audit.sites if site.measured]
    numbers = [one for site in sites for one in site.measured.values() if one.sqnr_db is not None]

    assert count(browser, "#sites .heatmap-label", len(numbers)) == len(numbers)
    assert count(browser, "#sites g.ytick", len(sites)) == len(sites)


def test_a_histogram_has_its_bars_and_the_values_of_the_format(browser: Any, report: tuple[Study, Path]) -> None:
    (first, *_), *_ = [entry.histograms for entry in report[0].entries.values() if entry.histograms]

    assert count(browser, "#values .barlayer .point", len(first.counts)) == len(first.counts)
    assert count(browser, "#values .scatterlayer .points path", 15) == 15


def test_a_menu_chooses_what_a_chart_shows(browser: Any, report: tuple[Study, Path]) -> None:
    _, second = [entry.result for entry in report[0].entries.values() if entry.result is not None]
    sqnr = second.audit.sites[0].measured["weight"].sqnr_db

    choose(browser, "sites", "cell", 1)

    label = (By.CSS_SELECTOR, "#sites .heatmap-label")
    WebDriverWait(browser, 10).until(text_to_be_present_in_element(label, f"{sqnr:.1f}"))


def test_numbers_sort_up_and_down(browser: Any) -> None:
    values = column(browser, "cells", "ratio")
    click(browser, "cells", "model")

    click(browser, "cells", "ratio")
    up = column(browser, "cells", "ratio")
    click(browser, "cells", "ratio")

    assert up == sorted(values, key=float)
    assert column(browser, "cells", "ratio") == up[::-1]


def test_equal_values_stay_in_their_order(browser: Any) -> None:
    click(browser, "cells", "ratio")
    before = column(browser, "cells", "recipe")

    click(browser, "cells", "model")
    click(browser, "cells", "model")

    assert column(browser, "cells", "recipe") == before


def test_nothing_is_requested_and_nothing_is_said_on_the_console(browser: Any, report: tuple[Study, Path]) -> None:
    requested = [line["message"] for line in browser.get_log("performance") if "requestWillBeSent" in line["message"]]

    assert [line for line in requested if "http:" in line or "https:" in line] == []
    assert requested
    assert browser.get_log("browser") == []


def test_charts_follow_the_colour_scheme(browser: Any) -> None:
    script = "return getComputedStyle(document.querySelector('#pareto .xtick text')).fill"
    colours = {"light": "rgb(29, 29, 31)", "dark": "rgb(236, 236, 234)"}

    for scheme in (*SCHEMES, *SCHEMES):
        prefer(browser, scheme)

        WebDriverWait(browser, 10).until(lambda driver, scheme=scheme: driver.execute_script(script) == colours[scheme])


@pytest.mark.parametrize("pixels", [1280, 390])
def test_the_page_does_not_scroll_sideways(browser: Any, pixels: int) -> None:
    width(browser, pixels)

    assert count(browser, ".chart > .plot-container", 3) == 3
    beyond = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    fits = WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(beyond) == 0)  # once plots are redrawn
    assert fits
