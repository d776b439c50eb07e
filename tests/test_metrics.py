"""Confidence intervals against a written-out bootstrap, and their coverage on samples whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.evaluation.metrics import RESAMPLES, finite_outputs, interval, intervals, rank

WIDTH = 8


def perplexity(means: Any) -> Any:
    return {"perplexity": (means["nll"] / means["tokens"]).exp()}


def test_a_metric_is_a_function_of_the_samples_means() -> None:
    metrics = qsim.Metrics(
        {"nll": torch.tensor([2.0, 6.0]), "tokens": torch.tensor([1, 3])}, perplexity, counts={"tokens": 4}
    )

    assert metrics == {"perplexity": math.exp(2), "tokens": 4}
    assert metrics.size == 2


def test_without_a_function_the_means_are_the_metrics() -> None:
    assert qsim.Metrics({"accuracy": torch.tensor([True, False, True, True])}) == {"accuracy": 0.75}


def test_a_sample_with_a_value_that_is_nan_has_no_score() -> None:
    metrics = qsim.Metrics(
        {"right": torch.tensor([1.0, 1.0]), "nll": torch.tensor([0.5, math.nan])}, counts={"texts": 2}
    )

    assert math.isnan(metrics["right"])
    assert metrics.samples["right"][0] == 1
    assert metrics["texts"] == 2


def test_equal_outputs_rank_last_and_nan_has_no_rank() -> None:
    outputs = torch.tensor([[3.0, 2.0, 1.0], [2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [3.0, math.nan, 1.0]])

    assert rank(outputs, torch.tensor([0, 1, 1, 0])).tolist() == pytest.approx([1, 3, 2, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("output", "finite"),
    [
        ([1.0, -math.inf], True),  # a class that the model rules out
        ([1.0, math.nan], False),
        ([1.0, math.inf], False),
        ([-math.inf, -math.inf], False),
    ],
)
@pytest.mark.parametrize("wrap", [tuple, dict, SimpleNamespace])
def test_an_output_is_finite_or_it_is_not(output: list[float], finite: bool, wrap: Any) -> None:
    class Fixed(nn.Module):
        def forward(self) -> Any:
            logits, boxes = torch.tensor(output), torch.tensor(math.inf)
            return (logits, boxes) if wrap is tuple else wrap(loss=None, logits=logits, boxes=boxes)

    model = Fixed()
    with finite_outputs(model) as found:
        model()

    assert found() is finite
    assert not model._forward_hooks


def test_resampling_is_what_a_plain_loop_gives() -> None:
    nll, tokens = torch.rand(7, dtype=torch.float64) * 9, torch.arange(7.0, dtype=torch.float64) + 1
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(7, (RESAMPLES, 7), generator=generator)
    by_hand = [math.exp(sum(nll[i] for i in row) / sum(tokens[i] for i in row)) for row in drawn.tolist()]

    found = qsim.Metrics({"nll": nll, "tokens": tokens}, perplexity).resampled(seed=5)["perplexity"]

    assert found.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_an_interval_is_the_middle_95_percent() -> None:
    assert interval(torch.arange(1001.0, dtype=torch.float64)) == (25, 975)
    assert interval(torch.full((1000,), math.inf, dtype=torch.float64)) == (math.inf, math.inf)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        metrics = qsim.Metrics({"mean": torch.randn(100, generator=generator)})
        low, high = interval(metrics.resampled(seed=0)["mean"])
        covered += low <= 0 <= high

    assert 180 <= covered <= 198  # 95% of 200 are 190, give or take


def test_pairs_are_surer_than_their_parts() -> None:
    """Samples that are hard for both runs do not add to the uncertainty of the ratio."""
    hard = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, after = qsim.Metrics({"loss": hard}), qsim.Metrics({"loss": 1.5 * hard})

    found = intervals(before, after, seed=0)["loss"]

    assert found["ratio"] == pytest.approx((1.5, 1.5))
    assert found["baseline"][1] - found["baseline"][0] > 0.1
    assert found["difference"][0] == pytest.approx(0.5 * found["baseline"][0])
    assert found == intervals(before, after, seed=0)["loss"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"loss": 1.0}, {"loss": 2.0}),
        (qsim.Metrics({"loss": torch.ones(1)}), qsim.Metrics({"loss": torch.ones(1)})),
        (qsim.Metrics({"loss": torch.ones(3)}), qsim.Metrics({"loss": torch.ones(4)})),
    ],
)
def test_plain_numbers_one_sample_and_other_samples_have_none(before: Any, after: Any) -> None:
    assert intervals(before, after, seed=0) == {}


class Squares(qsim.Evaluator):
    """An evaluator that compares with the model as it is."""

    name = "squares"
    metric = "error"

    def default_data(self) -> qsim.Data:
        return qsim.Data("random vectors", None, "0" * 64)

    def example(self, loaded: qsim.LoadedModel, data: qsim.Data) -> Any:
        return {"input": torch.ones(1, WIDTH)}

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> qsim.Metrics:
        x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(run.seed))
        with torch.no_grad():
            outputs = loaded.model(x)
        exact = outputs if run.reference is None else run.reference
        return qsim.Metrics({"error": (outputs - exact).square().sum(1)}, outputs=outputs)


class Plain(Squares):
    """An evaluator of a third party that does not report its samples."""

    name = "plain"

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> Any:
        return {"error": 1.0}


class Chosen(Squares):
    """An evaluator of a third party that chooses the largest output, and does not look for NaN."""

    name = "chosen"
    metric = "first"

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> Any:
        return {"first": float(loaded.model(torch.eye(WIDTH)).argmax(1).eq(0).float().mean())}


class Seen(Squares):
    """An evaluator whose outputs a person can look at."""

    name = "seen"

    def save_samples(self, baseline: Tensor, simulated: Tensor, directory: Any) -> None:
        (directory / "shapes.txt").write_text(f"{len(baseline)} {len(simulated)}")


class Vectors(qsim.Adapter):
    """An adapter of one linear layer."""

    name = "vectors"
    evaluator = "squares"

    def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return qsim.LoadedModel(nn.Linear(WIDTH, 4).to(dtype).eval())


@pytest.fixture
def evaluate(tmp_path: Any) -> Any:
    """`evaluate(evaluate="plain", …)`: a linear layer in a directory of its own, in INT4."""
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "config.json").write_text('{"model_type": "vectors", "architectures": ["Linear"]}')
    host = qsim.Host()
    host.register(Squares, Plain, Chosen, Seen, Vectors)

    def run(samples: Any = None, **recipe: Any) -> qsim.Result:
        values = {"model": str(tmp_path / "vectors"), "weights": "int4", **recipe}
        return qsim.evaluate(qsim.Recipe.of(values, host), host=host, samples=samples)

    return run


def test_the_simulated_run_is_given_the_baselines_outputs(evaluate: Any) -> None:
    result = evaluate()

    assert result.baseline["error"] == 0
    assert result.simulated["error"] > 0
    low, high = result.intervals["error"].simulated
    assert low < result.simulated["error"] < high
    assert math.isnan(result.ratio)
    assert qsim.Result.model_validate_json(result.model_dump_json()).intervals.keys() == {"error"}


def test_an_evaluator_that_returns_plain_numbers_still_works(evaluate: Any) -> None:
    result = evaluate(evaluate="plain")

    assert (result.simulated, result.intervals, result.ratio) == ({"error": 1.0}, {}, 1.0)


@pytest.mark.parametrize(("evaluator", "metric"), [("squares", "error"), ("chosen", "first")])
def test_a_model_whose_outputs_are_nan_has_no_score_whoever_evaluates_it(
    evaluate: Any, evaluator: str, metric: str
) -> None:
    result = evaluate(evaluate=evaluator, weights=lambda w: w * math.nan)

    assert math.isfinite(result.baseline[metric])
    assert math.isnan(result.simulated[metric])
    assert result.warnings[0] == f"simulated: no score for {metric}, as outputs are not finite"


def test_an_evaluators_own_data_go_before_the_models_and_its_first_metric_is_the_one(tmp_path: Path) -> None:
    class Scored(Squares):
        """An evaluator that names its metrics after the data."""

        name = "scored"
        metric = ""

        def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> Any:
            return {f"{data.name}/score": 1.0, "samples": 2.0}

    class Library(qsim.Adapter):
        """An adapter of one model with its data."""

        name = "library"

        def models(self) -> dict[str, qsim.NamedModel]:
            return {"mine": qsim.NamedModel(lambda: tmp_path, lambda: qsim.Data.of_text("text", "text"))}

        def load(self, model: str, dtype: torch.dtype) -> Any:
            raise NotImplementedError

    (tmp_path / "config.json").write_text('{"model_type": "vectors", "architectures": ["Linear"]}')
    host = qsim.Host()
    host.register(Scored, Vectors, Library)

    result = qsim.evaluate(qsim.Recipe.of({"model": "mine", "weights": "int4", "evaluate": "scored"}, host), host=host)

    assert (result.data.name, result.metric) == ("random vectors", "random vectors/score")


def test_a_named_model_may_say_which_evaluator_goes_with_its_data(tmp_path: Path) -> None:
    class Library(qsim.Adapter):
        """An adapter of one model that names the evaluator of the model's data."""

        name = "library"

        def models(self) -> dict[str, qsim.NamedModel]:
            return {"mine": qsim.NamedModel(lambda: tmp_path, Plain().default_data, evaluator="plain")}

        def load(self, model: str, dtype: torch.dtype) -> Any:
            raise NotImplementedError

    (tmp_path / "config.json").write_text('{"model_type": "vectors", "architectures": ["Linear"]}')
    host = qsim.Host()
    host.register(Squares, Plain, Vectors, Library)

    result = qsim.evaluate(qsim.Recipe.of({"model": "mine", "weights": "int4"}, host), host=host)

    assert (result.evaluator, result.adapter) == ("plain", "vectors")


def test_what_there_is_to_look_at_is_written_where_it_was_wanted(evaluate: Any, tmp_path: Any) -> None:
    evaluate(evaluate="seen", samples=tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b" / "shapes.txt").read_text() == "20 20"


def test_samples_that_cannot_be_saved_are_told_at_once(evaluate: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(qsim.DataError, match="^squares makes no samples that could be saved$"):
        evaluate(samples=tmp_path)
    with pytest.raises(qsim.DataError, match="file: it is not a directory$"):
        evaluate(evaluate="seen", samples=tmp_path / "file")
