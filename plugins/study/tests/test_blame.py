"""`qsim blame`: what each site costs, predicted and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qsim_study.blame import Blame, blame
from qsim_study.blame.command import blame as command

import qsim_core as qsim

TEXT = str(Path(__file__).parents[3] / "README.md")
FC1 = "model.decoder.layers.0.fc1"
FEW = qsim.Run(limit=2, batch_size=2)
TWO = {
    "model": "opt-tiny",
    "overrides": {FC1: {"weights": "int3", "outputs": "int8"}, "*.1.self_attn:pv": {"values": "int2"}},
}
"""A recipe for two sites."""


def qsim_blame(*options: str) -> Any:
    return CliRunner().invoke(command, [*options, "--data", TEXT, "--limit", "2"])


@pytest.fixture(scope="module")
def found() -> Blame:
    return blame(TWO, data=TEXT, verify=2, leave_one_out=True, run=FEW)


def test_a_site_alone_costs_what_an_evaluation_of_the_recipe_there_says(found: Blame) -> None:
    recipe = {"model": "opt-tiny", "overrides": {FC1: TWO["overrides"][FC1]}}  # type: ignore[index]

    result = qsim.evaluate(recipe, data=TEXT, run=FEW)

    measured = {site.site: site.alone.value for site in found.sites if site.alone is not None}
    assert measured[FC1] == pytest.approx(result.simulated["perplexity"] - result.baseline["perplexity"], rel=1e-6)


def test_of_two_sites_what_is_left_out_costs_the_whole_less_the_other_one_alone(found: Blame) -> None:
    first, second = found.sites

    assert first.left_out is not None and second.alone is not None and found.whole is not None
    assert first.left_out.value == pytest.approx(found.whole.value - second.alone.value, rel=1e-6)


def test_sites_are_in_the_order_of_their_predicted_cost(found: Blame) -> None:
    assert [site.predicted for site in found.sites] == sorted((site.predicted for site in found.sites), reverse=True)
    assert found.tau in (-1.0, 1.0)


def test_a_site_names_its_quantizers_by_role(found: Blame) -> None:
    roles = {site.site: site.roles for site in found.sites}

    assert roles[FC1] == {"weight": "channel(int3)", "output": "cast(int8)"}


def test_an_answer_is_read_back_from_its_json(found: Blame) -> None:
    assert Blame.model_validate_json(found.model_dump_json()) == found


def test_costs_are_measured_in_the_metric_that_is_named() -> None:
    recipe = {"model": "vit-tiny", "overrides": {"classifier": {"weights": "int2"}}}

    found = blame(recipe, metric="nll", samples=8, run=qsim.Run(limit=8))

    assert found.metric == "nll" and found.whole is not None and found.whole.value > 0
    assert found.whole.value == found.sites[0].alone.value  # type: ignore[union-attr]


def test_a_metric_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(qsim.DataError, match="^the evaluator has no metric 'loss'; there are: accuracy, top5, nll"):
        blame({"model": "vit-tiny", "weights": "int8"}, metric="loss", samples=1, run=FEW)


def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "blame.json"

    outcome = qsim_blame("opt-tiny", "--weights", "int4", "--verify", "1", "--samples", "1", "--json", str(file))

    answer = Blame.model_validate(json.loads(file.read_text()))
    assert outcome.exit_code == 0 and answer.sites[0].site in outcome.output
    assert [site.alone is not None for site in answer.sites].count(True) == 1


def test_static_scales_are_found_as_in_an_evaluation() -> None:
    recipe = {"model": "opt-tiny", "activations": "tensor(int8, static=true)", "weights": "int8"}

    found = blame(recipe, data=TEXT, verify=0, samples=1, run=FEW, calibration=qsim.Calibration(TEXT, 1, 32))

    assert "clipping" in found.sites[0].parts and found.whole is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "none"], "nothing to do: say --plugin, --precision"),
        (["--weights", "int4", "--operations", "softmax: ibert"], "leave operations out"),
        (["--weights", "channel(int4, gradient=lsq)"], "blame cannot tell what trained scales cost"),
    ],
)
def test_what_cannot_be_answered_is_one_line(options: list[str], message: str) -> None:
    outcome = qsim_blame("opt-tiny", *options)

    assert isinstance(outcome.exception, qsim.QsimError) and message in str(outcome.exception)
    assert "\n" not in str(outcome.exception)


def test_under_transforms_the_transformed_model_is_blamed() -> None:
    recipe = TWO | {"transforms": ["gptq"]}

    found = blame(recipe, data=TEXT, samples=1, run=FEW, calibration=qsim.Calibration(TEXT, 4, 64))

    assert found.whole is not None and not found.verified
    assert f"weights that lie on their grids already count as exact: 1, like {FC1}.weight" in found.notes


def test_an_evaluator_without_training_samples_is_one_line() -> None:
    class Untrained(qsim.Evaluator):
        name = "untrained"

        def default_data(self) -> qsim.Data:
            return qsim.Data.of_text("nothing", "")

        def evaluate(self, loaded: Any, data: Any, run: Any) -> dict[str, float]:
            return {"score": 1.0}

    with pytest.raises(qsim.DataError, match="^untrained makes no training samples; use an evaluator that does"):
        blame({"model": "opt-tiny", "weights": "int4", "evaluate": Untrained()})


def test_a_recipe_that_quantizes_nothing_is_one_line() -> None:
    with pytest.raises(qsim.RecipeError, match="^the recipe quantizes nothing; name weights"):
        blame({"model": "opt-tiny"}, data=TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("int4", "int8"), ("e2m1", "e4m3")])
def test_the_five_worst_sites_are_those_of_a_scan_of_all(formats: tuple[str, str]) -> None:
    weights, activations = formats
    recipe = {"model": "opt-tiny", "weights": weights, "activations": activations}

    found = blame(recipe, exhaustive=True, run=qsim.Run(limit=32))

    predicted = [site.site for site in found.sites[:5]]
    measured = [site.site for site in sorted(found.verified, key=lambda site: -site.alone.value)]  # type: ignore[union-attr]
    assert len(set(predicted) & set(measured[:5])) >= 4
    assert found.tau is not None and found.tau > 0.7
