"""No number changes: recipes of every kind give the numbers of the record in `tests/golden`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden.record import ENTRIES, GOLDEN, disagreements, environment, main, measured

RECORD = json.loads(GOLDEN.read_text())
STORED = RECORD["recipes"]
SHARE = 1e-6
"""The relative difference that a figure may have: processors add up sums in different orders."""
ELSEWHERE = 0.02
"""The relative difference that a model's figure may have on another processor, or with another library.

There the last bit of a sum may send a value that is rounded later to its other neighbour.
"""
ALIKE = RECORD["environment"] == environment()


def share(name: str) -> float:
    """The tolerance of a recipe; quantizers alone give the same numbers everywhere."""
    return SHARE if ALIKE or name.startswith(("formats/", "schemes/")) else ELSEWHERE


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.in_ci])
def test_a_recipe_gives_the_numbers_of_the_record(name: str) -> None:
    lines = disagreements(measured(ENTRIES[name]), STORED[name], share(name))

    assert not lines, f"{name} gives other numbers than {GOLDEN}:\n" + "\n".join(lines)


def test_every_recipe_is_in_the_record() -> None:
    assert list(ENTRIES) == list(STORED), f"run: python tests/golden/record.py --output {GOLDEN}"


def test_a_changed_output_is_named_with_its_figures() -> None:
    stored = STORED["formats/exotic"]
    other = {**stored["log2"], "norm": 2 * stored["log2"]["norm"], "sha256": "0"}

    assert disagreements(stored, stored) == []
    assert disagreements(stored, {**stored, "log2": other}, SHARE) == [
        f"log2: norm {other['norm']} -> {stored['log2']['norm']}"
    ]
    assert "log2: the bytes differ; norm" in disagreements(stored, {**stored, "log2": other})[0]


def test_the_script_ends_with_1_where_a_number_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, record = torch.get_num_threads(), tmp_path / "record.json"
    options = ["--only", "formats/int options", "--tolerance", "1e-6"]
    try:
        same = main([*options, "--output", str(record), "--compare", str(GOLDEN)])
        record.write_text(record.read_text().replace('"nan": ', '"nan": 9'))
        other = main([*options, "--compare", str(record)])
    finally:
        torch.set_num_threads(threads)

    assert (same, other) == (0, 1)
    assert "formats/int options: int(8, narrow=false): nan 9" in capsys.readouterr().out
