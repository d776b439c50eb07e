"""The tables of docs/methods.md are those that `benchmarks/methods.py` makes of the numbers that are kept."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MADE: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))
Kept, Loss, Row = MADE["Kept"], MADE["Loss"], MADE["Row"]


@pytest.fixture
def kept() -> Any:
    """Rounding to nearest loses 10, smoothing recovers 8 of them, and a third method was refused."""
    rows = [
        {"method": "rounding to nearest", "value": 30.0, "rank": 2, "bits": (4.25, 4.25)},
        {"method": "smoothing", "value": 22.0, "ratio": (0.73, 0.7, 0.76), "rank": 1, "bits": (4.25, 4.25)},
        {"method": "rotation", "failure": "no size divides 7"},
    ]
    losses = {"tiny": {"metric": "perplexity", "baseline": 20.0, "samples": 64}}
    here = {"model": "tiny", "format": "mxfp4"}
    return Kept(calibration_samples=16, models=losses, rows=[here | row for row in rows])


def test_the_page_is_what_the_script_makes_of_the_numbers() -> None:
    page = MADE["PAGE"].read_text()

    assert MADE["page"](page, Kept.model_validate_json(MADE["KEPT"].read_bytes())) == page


def test_a_cell_has_its_metric_its_share_its_interval_and_its_rank(kept: Any) -> None:
    assert MADE["text_of"](kept.rows[1], kept) == "**22.00**, 80% [0.700, 0.760], 1"


def test_what_was_refused_stands_with_its_reason(kept: Any) -> None:
    assert MADE["text_of"](kept.rows[2], kept) == "refused"
    assert MADE["refusals"](kept) == "- rotation on tiny under mxfp4: no size divides 7"


def test_a_winner_is_compared_with_rounding_to_nearest(kept: Any) -> None:
    assert MADE["winners"](kept).splitlines()[-1] == "| tiny | mxfp4 | smoothing | 80% |  | decided to be worse |"
