"""Confidence intervals against formulas, and their coverage on samples whose truth is known."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.evaluation.metrics import FEWEST, FEWEST_IN_ORDER, finite_outputs, interval, intervals, rank, student

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


def test_leaving_out_is_what_a_plain_loop_gives() -> None:
    nll, tokens = torch.rand(7, dtype=torch.float64) * 9, torch.arange(7.0, dtype=torch.float64) + 1
    kept = [[place for place in range(7) if place != left] for left in range(7)]
    by_hand = [math.exp(sum(nll[i] for i in row) / sum(tokens[i] for i in row)) for row in kept]

    found = qsim.Metrics({"nll": nll, "tokens": tokens}, perplexity).left_out()["perplexity"]

    assert found.tolist() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("degrees", "quantile"), [(3, 3.18245), (7, 2.36462), (15, 2.13145), (119, 1.98010)])
def test_students_t(degrees: int, quantile: float) -> None:
    assert student(degrees) == pytest.approx(quantile, rel=0.01 if degrees < 7 else 5e-4)


def test_the_interval_of_a_symmetric_mean_is_students() -> None:
    samples = torch.tensor([-3.0, -2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    metrics = qsim.Metrics({"mean": samples})

    low, high = interval(torch.tensor(0.0), metrics.left_out()["mean"])

    assert (low, high) == pytest.approx((-2.36462 * 2 / math.sqrt(8), 2.36462 * 2 / math.sqrt(8)), rel=1e-3)


def test_the_interval_of_what_is_not_finite_is_nan() -> None:
    assert all(map(math.isnan, interval(torch.tensor(math.inf), torch.full((9,), math.inf))))


def normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def skewed(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Exponential samples with mean 0."""
    return -torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-300).log() - 1


def long_tailed(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Lognormal samples with mean 0."""
    return normal(shape, generator).exp() - math.exp(0.5)


def neighbours(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Samples that have half of the sample before them, as windows of a text have."""
    found = normal(shape, generator)
    for place in range(1, shape[1]):
        found[:, place] = found[:, place - 1] / 2 + math.sqrt(3 / 4) * found[:, place]
    return found


@pytest.mark.parametrize(
    ("draw", "many"),
    [
        *((draw, many) for draw in (normal, skewed) for many in (FEWEST, 16, 120)),
        *((long_tailed, many) for many in (16, 64)),
        *((neighbours, many) for many in (FEWEST_IN_ORDER, 32, 120)),
    ],
)
def test_95_of_100_intervals_hold_the_true_ratio(draw: Any, many: int) -> None:
    trials, held = 1000, 0
    generator = torch.Generator().manual_seed(0)
    before = 3.8 + 0.5 * draw((trials, many), generator)
    after = before + 0.09 + 0.05 * draw((trials, many), generator)
    for pair in zip(before, after, strict=True):
        b, a = (qsim.Metrics({"nll": nll}, lambda m: {"perplexity": m["nll"].exp()}) for nll in pair)
        ratio = torch.tensor(a["perplexity"] / b["perplexity"])
        left_out = a.left_out()["perplexity"] / b.left_out()["perplexity"]
        low, high = interval(ratio, left_out, in_order=draw is neighbours)
        held += low <= math.exp(0.09) <= high

    assert 0.93 <= held / trials <= 0.97


@pytest.mark.parametrize("many", [FEWEST, 32])
def test_a_few_large_losses_leave_a_ratio_as_uncertain_as_it_is(many: int) -> None:
    """Heavy tails without skewness: what looks skewed in one draw is chance."""
    generator = torch.Generator().manual_seed(0)
    before = normal((1500, many), generator).exp()
    after = before * 1.1 * (0.1 * normal((1500, many), generator) - 0.005).exp()
    without = [(x.sum(-1, keepdim=True) - x) / (many - 1) for x in (after, before)]

    found = [interval(*pair) for pair in zip(after.mean(-1) / before.mean(-1), without[0] / without[1], strict=True)]

    assert 0.92 <= sum(low <= 1.1 <= high for low, high in found) / len(found) <= 0.97


@pytest.mark.parametrize("many", [FEWEST, 16, 60])
@pytest.mark.parametrize(("right", "changed"), [(0.5, 0.02), (0.8, 0.1), (0.95, 0.1)])
def test_intervals_of_shares_hold_the_true_one_also_where_few_answers_change(
    right: float, changed: float, many: int
) -> None:
    trials, held = 200, Counter[str]()
    generator = torch.Generator().manual_seed(0)
    after = right * (1 - changed) + (1 - right) * changed
    for _ in range(trials):
        answers, flips = (torch.rand(many, generator=generator) < share for share in (right, changed))
        pair = (qsim.Metrics({"right": found.double()}) for found in (answers, answers ^ flips))
        found = intervals(*pair)["right"]
        truth = {"baseline": right, "simulated": after, "ratio": after / right, "difference": after - right}
        held.update(name for name, value in truth.items() if found[name][0] <= value <= found[name][1])

    assert min(held.values()) >= 0.93 * trials


def test_an_interval_of_shares_stays_among_shares() -> None:
    answers = torch.tensor([1.0] * 19 + [0.0], dtype=torch.float64)

    found = intervals(qsim.Metrics({"right": answers}), qsim.Metrics({"right": answers}))["right"]

    assert found["baseline"][1] == 1.0 and found["baseline"][0] < 0.95


def test_pairs_are_surer_than_their_parts() -> None:
    """Samples that are hard for both runs do not add to the uncertainty of the ratio."""
    hard = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, after = qsim.Metrics({"loss": hard}), qsim.Metrics({"loss": 1.5 * hard})

    found = intervals(before, after)["loss"]

    assert found["ratio"] == pytest.approx((1.5, 1.5))
    assert found["baseline"][1] - found["baseline"][0] > 0.1
    assert found["difference"][0] == pytest.approx(0.5 * found["baseline"][0])
    assert found == intervals(before, after)["loss"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"loss": 1.0}, {"loss": 2.0}),
        (qsim.Metrics({"loss": torch.rand(7)}), qsim.Metrics({"loss": torch.rand(7)})),
        (qsim.Metrics({"loss": torch.rand(13)}), qsim.Metrics({"loss": torch.rand(14)})),
        (qsim.Metrics({"loss": torch.rand(15)}, in_order=True), qsim.Metrics({"loss": torch.rand(15)})),
    ],
)
def test_plain_numbers_few_samples_and_other_samples_have_none(before: Any, after: Any) -> None:
    assert intervals(before, after) == {}


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


class Kept(Squares):
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
    host.register(Squares, Plain, Chosen, Kept, Vectors)

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


def test_a_text_in_place_of_a_name_of_data_is_one_line() -> None:
    with pytest.raises(qsim.DataError, match=r"^data are named by a file or a data set, not by a text of 9000 char"):
        qsim.evaluate({"model": "opt-tiny", "weights": "int4"}, data="a text of " * 900)


def test_a_work_directory_may_be_text() -> None:
    assert qsim.Run(work_dir="work").work_dir == Path("work")  # type: ignore[arg-type]
