"""The methods together: one command and one recipe file for each of the paper's combinations, on every kind of model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import make, tokens

import qsim_core as qsim
from qsim_core.cli import main

FEW = ["--calibration-samples", "2", "--calibration-seqlen", "64", "--limit", "1"]
COMBINATIONS = {
    "ABFP-SQ": (["--plugin", "abfp", "--plugin", "smoothquant"], ["smoothquant(0.5)"]),
    "SQ, GPTQ": (["--precision", "w4a8", "--plugin", "smoothquant", "--plugin", "gptq"], ["smoothquant(0.5)", "gptq(0.01)"]),
    "RPTQ, GPTQ": (["--precision", "w4a8", "--plugin", "rptq", "--plugin", "gptq"], ["rptq(32)", "gptq(0.01)"]),
    "ABFP, GPTQ": (["--plugin", "abfp", "--plugin", "gptq"], ["gptq(0.01)"]),
    "static MSE": (["--precision", "w4a8", "--static", "mse"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_runs_from_one_command_and_from_one_recipe_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, transforms = COMBINATIONS[name]
    invoke = CliRunner().invoke

    recipe = invoke(main, ["evaluate", *options, "--dry-run"])
    Path("recipe.yaml").write_text(recipe.stdout)
    command = invoke(main, ["evaluate", *options, *FEW, "--json", "command.json", "--quiet"])
    file = invoke(main, ["evaluate", "--recipe", "recipe.yaml", *FEW, "--json", "file.json", "--quiet"])

    assert [outcome.exit_code for outcome in (recipe, command, file)] == [0, 0, 0], command.output + file.output
    first, second = (qsim.Result.read(Path(path)) for path in ("command.json", "file.json"))
    assert first.recipe["transforms"] == transforms
    assert first.calibration is not None
    assert first.simulated == second.simulated
    assert [report.transform for report in first.transforms] == [report.transform for report in second.transforms]


def test_a_command_goes_on_where_another_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command's later blocks are taken away, as if it had died there."""
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--precision", "w3a16", "--plugin", "gptq", *FEW, "--work-dir", "work", "--quiet", "--json"]
    whole = CliRunner().invoke(main, [*command, "whole.json"])
    for block in sorted(Path("work").glob("*/block-*.pt"))[2:]:
        block.unlink()

    resumed = CliRunner().invoke(main, [*command, "resumed.json"])

    assert (whole.exit_code, resumed.exit_code) == (0, 0), whole.output + resumed.output
    first, second = (qsim.Result.read(Path(f"{name}.json")) for name in ("whole", "resumed"))
    assert first.simulated == second.simulated
    layers = len(first.transforms) // 2
    assert first.transforms[:layers] == second.transforms[:layers], "those are the first run's own, seconds and all"


@pytest.mark.parametrize("transform", ["smoothquant", "gptq", "rptq", "awq", "hadamard", "bias_correction"])
@pytest.mark.parametrize("family", ["opt-350m", "opt", "llama", "gpt2", "codegen"])
def test_every_method_runs_on_every_family(transform: str, family: str) -> None:
    """What cannot be done to a model is refused by name, and the rest goes on."""
    model = make(family)
    batches: list[Any] = [{"input_ids": tokens(seed), "use_cache": False} for seed in range(4)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)
        try:
            simulation = qsim.simulate(
                model, weights="int4", activations="int8", transforms=[transform], calibration=batches
            )
        except qsim.RecipeError as error:
            assert (transform, family, "left alone: it has no bias" in str(error)) == ("bias_correction", "llama", True)
            return

    with torch.no_grad():
        assert model(**batches[0]).logits.isfinite().all()
    assert any(report.after is not None for report in simulation.reports)
    assert all(report.note for report in simulation.reports if report.after is None)
