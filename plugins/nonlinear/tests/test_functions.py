"""Functions of one number against loops over numbers, and against the errors that are known of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.testing import OperationSuite


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def computed(function: Callable[[Tensor], Tensor], kind: str, text: str, x: Tensor) -> Tensor:
    model = Calls(function)
    with qsim.simulate(model, {"operations": {kind: text}}):
        return model(x)


def test_a_table_has_the_middle_of_each_cell() -> None:
    x = [-9.0, -2.0, -0.51, 0.0, 0.26, 1.99, 7.0]

    found = computed(torch.tanh, "tanh", "table(8, low=-2, high=2)", torch.tensor(x))

    def by_hand(value: float) -> float:
        if not -2 <= value <= 2:
            return math.copysign(1, value)
        return math.tanh(-2 + (min(int((value + 2) / 0.5), 7) + 0.5) * 0.5)

    assert found.tolist() == pytest.approx([by_hand(value) for value in x], abs=1e-7)


def test_lines_meet_at_the_functions_own_values() -> None:
    x = torch.tensor([-4.0, -3.0, -2.5, 0.0, 1.0, 4.0])

    found = computed(F.gelu, "gelu", "piecewise(4, low=-4, high=4)", x)

    own = F.gelu(torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])).tolist()
    lines = [own[0], (own[0] + own[1]) / 2, 0.25 * own[0] + 0.75 * own[1], own[2], (own[2] + own[3]) / 2, own[4]]
    assert found.tolist() == pytest.approx(lines, abs=1e-6)


def test_a_base_of_two_shifts_by_the_whole_part() -> None:
    x = torch.tensor([0.0, -1.0, -5.5, -80.0])

    found = computed(torch.exp, "exp", "table(8, base=2)", x)

    def by_hand(value: float) -> float:
        power = value / math.log(2)
        whole = math.floor(power)
        return 2.0 ** (whole + (int((power - whole) * 8) + 0.5) / 8)

    assert found.tolist() == pytest.approx([by_hand(value) for value in x.tolist()], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "function", "text", "limit"),
    [
        ("rsqrt", torch.rsqrt, "newton(0)", 0.21),
        ("rsqrt", torch.rsqrt, "newton(3)", 5e-5),
        ("reciprocal", torch.reciprocal, "newton(0)", 0.0589),
        ("reciprocal", torch.reciprocal, "newton(2)", 1.3e-5),
        ("sqrt", torch.sqrt, "newton(4)", 1e-6),
        ("rsqrt", torch.rsqrt, "table(256)", 0.006),
        ("reciprocal", torch.reciprocal, "piecewise(64)", 2e-4),
    ],
)
def test_positive_numbers_of_all_magnitudes_have_the_same_relative_error(
    kind: str, function: Callable[[Tensor], Tensor], text: str, limit: float
) -> None:
    x = torch.logspace(-30, 30, 4001)

    found, exact = computed(function, kind, text, x), function(x)

    assert 0 < ((found - exact) / exact).abs().max() < limit


def test_the_errors_of_ibert_are_those_of_its_paper() -> None:
    x = torch.linspace(-8, 8, 4001)

    of_exp = (computed(torch.exp, "exp", "ibert", x[:2001]) - x[:2001].exp()).abs().max()
    of_gelu = (computed(F.gelu, "gelu", "ibert", x) - F.gelu(x)).abs().max()

    assert (float(of_exp), float(of_gelu)) == (pytest.approx(1.9e-3, abs=6e-4), pytest.approx(1.8e-2, abs=2e-3))


@pytest.mark.parametrize("text", ["table(4)", "piecewise(4)", "newton(1)"])
def test_a_reciprocal_is_odd(text: str) -> None:
    x = torch.tensor([3.0, 0.7, torch.inf, 0.0])

    found = computed(torch.reciprocal, "reciprocal", text, torch.cat([x, -x]))

    assert torch.equal(found[:4], -found[4:])
    assert found[:2].tolist() != torch.reciprocal(x)[:2].tolist()


def test_the_root_of_infinity_is_infinite() -> None:
    assert computed(torch.sqrt, "sqrt", "newton(3)", torch.tensor([torch.inf, 0.0])).tolist() == [torch.inf, 0.0]


@pytest.mark.parametrize("text", ["table(512)", "table(64, base=2)", "piecewise(64)", "newton(2)", "ibert"])
def test_a_masked_score_has_no_share(text: str) -> None:
    scores = torch.tensor([[1.0, 0.5, -torch.inf], [0.0, torch.finfo(torch.float32).min, 0.0]])

    shares = computed(lambda x: F.softmax(x, -1), "softmax", text, scores)

    assert (shares[0, 2], shares[1, 1]) == (0, 0)
    assert torch.allclose(shares, scores.softmax(-1), atol=0.05)


@pytest.mark.parametrize(
    ("kind", "function", "text"),
    [
        ("norm", lambda x: F.layer_norm(x, (64,)), "newton(3)"),
        ("norm", lambda x: F.rms_norm(x, (64,)), "table(4096)"),
        ("norm", lambda x: F.layer_norm(x, (64,)), "piecewise(64)"),
        ("silu", F.silu, "piecewise(128)"),
        ("sigmoid", torch.sigmoid, "table(1024)"),
        ("erf", torch.erf, "piecewise(64)"),
        ("log", lambda x: x.abs().log(), "table(512)"),
    ],
)
def test_norms_and_activations_are_near(kind: str, function: Callable[[Tensor], Tensor], text: str) -> None:
    x = 5 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    found = computed(function, kind, text, x)

    assert 0 < (found - function(x)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("kind", "function", "text", "message"),
    [
        ("elu", F.elu, "table(8)", r"table\(8\) knows no range of elu; say low and high"),
        ("softplus", lambda x: F.softplus(x, 0.05), "table(8)", r"table\(8\) tabulates softplus with beta 1, not 0.05"),
        ("gelu", F.gelu, "newton(2)", r"newton\(2\) does not compute gelu"),
        ("exp", torch.exp, "table(1)", "n should be greater than or equal to 2, not 1"),
        ("exp", torch.exp, "table(8, low=1, high=0)", "low is below high, not 1 and 0"),
        ("exp", torch.exp, "table(8, base=10)", "base"),
        ("exp", torch.exp, "table(8)", r"table\(8\) is given exp of 1, above its range; say high, or base=2"),
    ],
)
def test_bad_input_is_an_error(kind: str, function: Callable[[Tensor], Tensor], text: str, message: str) -> None:
    with pytest.raises(qsim.QsimError, match=message):
        computed(function, kind, text, torch.ones(3))


def test_a_command_shows_and_records_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("one two three four " * 200)
    words = "{softmax: 'table(8, base=2)', add: {output: bf16}}"
    command = ["evaluate", "opt-tiny", "--weights", "int8", "--operations", words, "--data", "text", "--limit", "1"]

    outcome = CliRunner().invoke(main, [*command, "--json", "r.json"])

    assert outcome.exit_code == 0, outcome.output
    rows = [" ".join(line.strip("│ ").split()) for line in outcome.stdout.splitlines()]
    assert {"softmax │ table(8, base=2)", "add │ output cast(bf16)"} <= set(rows)
    result = qsim.Result.read(Path("r.json"))
    assert result.recipe["operations"]["softmax"] == {"implementation": "table(8, base=2)"}
    assert sum(found.implementation == "table(8, base=2)" for found in result.audit.operations) == 4
    assert "nonlinear" in result.plugins


class TestOperations(OperationSuite):
    text = ("table(256)", "table(64, base=2)", "piecewise(64)", "newton(3)", "ibert")
