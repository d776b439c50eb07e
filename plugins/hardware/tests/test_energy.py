"""Energy and area: the entries of Horowitz's table, and the interpolation between them."""

from __future__ import annotations

import pytest
import torch
from qsim_hardware.arithmetic_units import (
    FLOAT_ADD,
    FLOAT_MULTIPLY,
    INTEGER_ADD,
    INTEGER_MULTIPLY,
    Figures,
    interpolated,
)
from qsim_hardware.formats import holds, significand_bits
from torch import nn

import qsim_core as qsim


def priced(text: str, dtype: torch.dtype = torch.bfloat16, **recipe: str) -> dict[str, float]:
    layer = nn.Linear(64, 8, bias=False, dtype=dtype)
    work = qsim.simulate(layer, **recipe).work(torch.ones(4, 64, dtype=dtype))  # type: ignore[arg-type]
    totals: dict[str, float] = qsim.parse(text).cost(work).totals
    return totals


MACS = 4 * 64 * 8


@pytest.mark.parametrize("table", [INTEGER_ADD, FLOAT_ADD, INTEGER_MULTIPLY, FLOAT_MULTIPLY])
def test_the_entries_of_the_table_are_exact_and_wider_units_cost_more(table: dict[int, Figures]) -> None:
    for width, figures in table.items():
        found = interpolated(table, width)
        assert (found.picojoules, found.square_micrometres) == pytest.approx(
            (figures.picojoules, figures.square_micrometres)
        )

    costs = [interpolated(table, width).picojoules for width in range(1, 1200)]
    assert costs == sorted(costs)


def test_int8_into_32_bits_is_a_multiplier_and_an_adder_of_the_table() -> None:
    found = priced("energy", weights="int8", activations="int8")

    assert found["joules_of_arithmetic"] == pytest.approx(MACS * (0.2 + 0.1) * 1e-12)
    assert priced("area", weights="int8", activations="int8") == pytest.approx({"square_micrometres": 282 + 137})


def test_an_unquantized_model_has_the_units_of_its_dtype() -> None:
    assert priced("energy", torch.float16)["joules_of_arithmetic"] == pytest.approx(MACS * (1.1 + 0.9) * 1e-12)
    assert priced("energy", torch.float32)["joules_of_arithmetic"] == pytest.approx(MACS * (3.7 + 0.9) * 1e-12)


def test_memory_is_dram_and_a_buffer_for_each_bit() -> None:
    found = priced('energy(dram=1300.0, buffer="8KB")', torch.float16)

    words = (4 * 64 + 8 * 64 + 4 * 8) * 16 / 64
    assert found["joules_of_memory"] == pytest.approx(words * (1300 + 2 * 10) * 1e-12)


def test_a_narrower_accumulator_takes_less() -> None:
    recipe = {"weights": "int4", "activations": "int4"}

    wide, narrow = (priced("area", **recipe, arithmetic=text) for text in ("auto", "accumulators.int16"))

    assert wide["square_micrometres"] - narrow["square_micrometres"] == pytest.approx(137 - 67)


def test_one_unit_of_each_kind_is_counted_once() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    work = qsim.simulate(model, weights="int8", activations="int8").work(torch.ones(2, 8))

    assert qsim.parse("area").cost(work).totals == pytest.approx({"square_micrometres": 282 + 137})


@pytest.mark.parametrize(
    ("text", "bits"), [("e4m3", 4), ("e5m2", 3), ("e2m1", 2), ("bf16", 8), ("fp16", 11), ("int8", 7), ("e8m0", 1)]
)
def test_the_bits_of_a_significand(text: str, bits: int) -> None:
    assert significand_bits(qsim.parse(text)) == bits


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        ("int8", "int4", True),
        ("int8", "uint8", False),
        ("e4m3", "e2m1", True),
        ("e4m3", "int4", True),
        ("e4m3", "int8", False),
        ("e4m3", "e5m2", False),
        ("fp16", "int8", True),
        ("fp16", "bf16", False),
        ("bf16", "e5m2", True),
    ],
)
def test_a_format_holds_another_if_it_has_all_its_values(wide: str, narrow: str, expected: bool) -> None:
    assert holds(qsim.parse(wide), qsim.parse(narrow)) is expected
