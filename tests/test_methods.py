"""The methods in combination: a command and a recipe file for each of the paper's, on every kind of model."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES as ARCHITECTURES
from architectures import build
from click.testing import CliRunner
from coverage_page import METHODS as EVERYWHERE
from coverage_page import kept, outcome_of
from families import FAMILIES, make, tokens
from torch import nn

import qsim_core as qsim
from qsim_core.cli.main import main

ROOT = Path(__file__).parent.parent
TEXTS = ["--data", str(ROOT / "README.md"), "--calibration-data", str(ROOT / "CHANGELOG.md")]
SHORT = ["--limit", "1", "--set", "perplexity.seqlen=32"]
FEW = [*TEXTS, "--calibration-samples", "2", "--calibration-seqlen", "32", *SHORT]
COMBINATIONS = {
    "ABFP-SQ": (["--plugin", "abfp", "--plugin", "smoothquant"], ["smoothquant(0.5)"]),
    "SQ, GPTQ": (["--precision", "w4a8", "--plugin", "smoothquant", "--plugin", "gptq"], ["smoothquant(0.5)", "gptq(0.01)"]),
    "RPTQ, GPTQ": (["--precision", "w4a8", "--plugin", "rptq", "--plugin", "gptq"], ["rptq(32)", "gptq(0.01)"]),
    "ABFP, GPTQ": (["--plugin", "abfp", "--plugin", "gptq"], ["gptq(0.01)"]),
    "static MSE": (["--precision", "w4a8", "--static", "mse"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_runs_from_one_command_and_from_one_recipe_file(
    name: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, transforms = COMBINATIONS[name]
    invoke = CliRunner().invoke

    recipe = invoke(main, ["evaluate", str(small), *options, "--dry-run"])
    Path("recipe.yaml").write_text(recipe.stdout)
    command = invoke(main, ["evaluate", str(small), *options, *FEW, "--json", "command.json", "--quiet"])
    file = invoke(main, ["evaluate", "--recipe", "recipe.yaml", *FEW, "--json", "file.json", "--quiet"])

    assert [outcome.exit_code for outcome in (recipe, command, file)] == [0, 0, 0], command.output + file.output
    first, second = (qsim.Result.read(Path(path)) for path in ("command.json", "file.json"))
    assert first.recipe["transforms"] == transforms
    assert first.calibration is not None
    assert first.simulated == second.simulated
    assert [report.transform for report in first.transforms] == [report.transform for report in second.transforms]


def test_a_command_goes_on_where_another_stopped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later block of the first command is removed, as if it had died there."""
    monkeypatch.chdir(tmp_path)
    options = ["--precision", "w3a16", "--plugin", "gptq", *FEW, "--work-dir", "work", "--quiet", "--json"]
    command = ["evaluate", str(small), *options]
    whole = CliRunner().invoke(main, [*command, "whole.json"])
    for block in sorted(Path("work").glob("*/block-*.pt"))[1:]:
        block.unlink()

    resumed = CliRunner().invoke(main, [*command, "resumed.json"])

    assert (whole.exit_code, resumed.exit_code) == (0, 0), whole.output + resumed.output
    first, second = (qsim.Result.read(Path(f"{name}.json")) for name in ("whole", "resumed"))
    assert first.simulated == second.simulated
    layers = len(first.transforms) // 2
    assert first.transforms[:layers] == second.transforms[:layers], "those are the first run's own, seconds and all"


def test_what_stands_beside_weights_has_a_price(small: Path) -> None:
    """A matrix [N, K] in 4 bits has factors of 16 bits beside it: 4 (N + K) elements for a rank of 4."""
    command = ["cost", str(small), "--weights", "cast(int4)", "--prompt", "8", "--generate", "0", "--json", "-"]

    plain, split = (
        json.loads(CliRunner().invoke(main, [*command, *more]).stdout)
        for more in ([], ["--plugin", "svdquant", "--set", "svdquant.rank=4"])
    )

    model = make("opt")
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "layers" in name]
    extra = sum(4 * sum(w.shape) for w in matrices)
    assert split["weight_bytes"] - plain["weight_bytes"] == 2 * extra
    assert split["phases"][0]["flops"] - plain["phases"][0]["flops"] == 2 * 8 * extra


METHODS = ["smoothquant", "gptq", "rptq", "awq", "hadamard", "bias_correction"]
KINDS = [
    ["wush(8)", "hadamard(size=8)", "spinquant(1, size=8)", "flatquant(2)"],
    ["gptaq", "qronos", "gptq(activations=true)"],
    ["signround(2)", "adaround(2)"],
    ["imatrix", "local_hessian"],
    ["svdquant(4, grid=2)", "arcquant"],
]
"""Methods that share their way through a model: each family meets one of each kind, each in its turn."""
BLOCKS = {"arcquant": "block(int8, 2)"}
"""The activations of a method that takes block formats alone."""


@pytest.mark.parametrize(
    ("transform", "family"),
    [
        *itertools.product(METHODS, FAMILIES),
        *((kind[turn % len(kind)], family) for turn, family in enumerate(FAMILIES) for kind in KINDS),
    ],
)
def test_every_method_runs_on_every_family(transform: str, family: str) -> None:
    """Norms that cannot be changed are refused by name, and the run continues with the others."""
    model = make(family)
    batches: list[Any] = [{"input_ids": tokens(seed), "use_cache": False} for seed in range(4)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)
        try:
            simulation = qsim.simulate(
                model,
                weights="int4",
                activations=BLOCKS.get(transform, "int8"),
                transforms=[transform],
                calibration=batches,
            )
        except qsim.RecipeError as error:
            assert (transform, family, "left alone: it has no bias" in str(error)) == ("bias_correction", "llama", True)
            return

    with torch.no_grad():
        assert model(**batches[0]).logits.isfinite().all()
    assert any(report.after is not None for report in simulation.reports)
    assert all(report.note for report in simulation.reports if report.after is None)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["svdquant(1, grid=0)", "arcquant"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_split_changes_every_architecture_or_says_why_not(name: str, transform: str) -> None:
    example = ARCHITECTURES[name].example
    recipe: Any = {"weights": "int4", "activations": BLOCKS.get(transform, "int8"), "transforms": [transform]}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)
        try:
            reports = qsim.simulate(build(name), recipe, calibration=[example], example=example).reports
        except qsim.RecipeError as error:
            assert re.search("left alone|found nothing to do", str(error))
            return

    assert any(report.after is not None for report in reports)
    assert all(report.note for report in reports if report.after is None)


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERYWHERE)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_method_does_on_every_architecture_what_the_page_of_coverage_says(name: str, method: str) -> None:
    assert outcome_of(name, method) == kept()[name][method]


def test_every_method_was_tried_on_every_architecture() -> None:
    assert {name: list(outcomes) for name, outcomes in kept().items()} == {
        name: [*EVERYWHERE] for name in ARCHITECTURES
    }


def test_a_method_refuses_an_architecture_in_one_line_that_names_the_reason() -> None:
    refused = [one["refused"] for outcomes in kept().values() for one in outcomes.values() if "refused" in one]

    assert all(
        re.search("left alone|left in order|needs gradients|found nothing to do|finds no", text) for text in refused
    )
    assert not any("\n" in text for text in refused)


@pytest.mark.parametrize(
    ("transforms", "late"),
    [
        (["gptq", "smoothquant"], "smoothquant(0.5)"),
        (["gptq", "hadamard"], "hadamard(0)"),
        (["rptq", "awq"], "awq(20)"),
    ],
)
def test_a_method_that_comes_too_late_is_refused(transforms: list[str], late: str) -> None:
    model, batches = make("opt"), [{"input_ids": tokens(seed)} for seed in range(6)]
    exact = model(**batches[0]).logits

    message = rf"^{re.escape(late)} would change .*; put {re.escape(late)} before that one$"
    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(model, weights="int4", activations="int8", transforms=transforms, calibration=batches)

    assert torch.equal(model(**batches[0]).logits, exact)


@pytest.mark.parametrize(
    ("transform", "dtype"),
    [
        ("smoothquant", torch.bfloat16),
        ("gptq", torch.float16),
        ("rptq", torch.bfloat16),
        ("awq", torch.float16),
        ("hadamard", torch.bfloat16),
        ("wush(8)", torch.float16),
        ("qronos", torch.bfloat16),
        ("signround(2)", torch.float16),
        ("imatrix", torch.bfloat16),
        ("spinquant(1, size=8)", torch.float16),
        ("svdquant(4, grid=2)", torch.bfloat16),
        ("flatquant(2)", torch.float16),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has learned nothing")  # one step may be too few
def test_every_method_runs_in_half_precision(transform: str, dtype: torch.dtype) -> None:
    batches = [{"input_ids": tokens(seed)} for seed in range(6)]
    layers = {}
    for precision in (torch.float32, dtype):
        model = make("llama").to(precision)
        recipe: Any = {"weights": "int4", "activations": "int8", "transforms": [transform]}
        simulation = qsim.simulate(model, recipe, calibration=batches)
        layers[precision] = {report.layer for report in simulation.reports if report.after is not None}
        with torch.no_grad():
            assert model(**batches[0]).logits.isfinite().all()

    assert layers[dtype] == layers[torch.float32]


def test_hadamard_rotates_a_weight_that_is_used_transposed() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    model, x = Transposed(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    exact = model(x)

    qsim.simulate(model, weights="int16", activations="int16", transforms=["hadamard"], example=x)

    assert (model(x) - exact).norm() < 1e-3 * exact.norm()


def test_hadamard_twice_is_refused() -> None:
    message = r"^hadamard\(1\) changed nothing in this model: left alone: its input is rotated already"
    with pytest.raises(qsim.RecipeError, match=message):
        transforms = ["hadamard(0)", "hadamard(1)"]
        qsim.simulate(nn.Linear(16, 8), weights="int8", transforms=transforms, example=torch.ones(1, 16))


def test_static_scales_of_nan_name_site_and_sample() -> None:
    batches = [torch.ones(2, 4), torch.tensor([[1.0, float("nan"), 0.0, 0.0]])]

    with pytest.raises(qsim.DataError, match="^calibration batch 1 brings NaN or Inf to weight; leave it out$"):
        qsim.simulate(nn.Linear(4, 4), activations="tensor(int8, static=true)", calibration=batches)
