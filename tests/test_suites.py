"""The conformance suites find a fault, and name the component and the cause."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import (
    AdapterSuite,
    ArithmeticSuite,
    CalibratorSuite,
    EvaluatorSuite,
    HardwareSuite,
    OperationSuite,
    QuantizerSuite,
    TransformSuite,
)
from qsim_core.testing.component import ComponentSuite

pytestmark = pytest.mark.filterwarnings("error")


class Rounding(qsim.Quantizer):
    """Whole numbers, wrong in the way that `wrong` says."""

    name = "rounding"
    wrong: str = ""

    @property
    def by_rows(self) -> bool:
        return self.wrong == "rows"

    def quantize(self, x: Tensor) -> Tensor:
        match self.wrong:
            case "dtype":
                return x.float().round()
            case "input":
                return x.round_()
            case "strides":
                return x.round().contiguous()
            case "random":
                return (x + torch.rand(x.shape)).floor()
            case "arithmetic":
                return ((x / 3).round() * 3 / 7) * 7.1
            case "zeros":
                return x.round() + 1
            case "nan":
                return x.round().nan_to_num(0.0)
            case "infinity":
                return torch.where(x.isinf(), 0.0, x.round())
            case "rows":
                return (x - x.mean()).round()
        return x.round()

    def passes(self, x: Tensor) -> Tensor | None:
        return x.abs() < 1 if self.wrong == "gradient" else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantize(x) if self.wrong == "gradient" else super().__call__(x)


@pytest.mark.parametrize(
    ("wrong", "test", "message"),
    [
        ("dtype", "test_shape_dtype_and_device_are_kept_and_the_input_too", "rounding(dtype) turned a tensor () torch.bfloat16 into () torch.float32"),
        ("input", "test_shape_dtype_and_device_are_kept_and_the_input_too", "rounding(input) changed its input; "),
        ("strides", "test_the_order_in_memory_is_kept", "rounding(strides) made strides (40, 1) of (1, 6)"),
        ("random", "test_it_gives_the_same_each_time_and_draws_no_global_random_numbers",
         "rounding(random) rounds with torch's global random numbers; use a torch.Generator with a seed"),
        ("arithmetic", "test_bfloat16_is_rounded_by_its_value", "rounding(arithmetic) computes in bfloat16; "),
        ("zeros", "test_zeros_stay_zeros", "rounding(zeros) made [1.0] of zeros"),
        ("nan", "test_nan_stays_nan", "rounding(nan) made 0.0 of NaN; a simulation must show it"),
        ("infinity", "test_infinity_does_not_become_small", "rounding(infinity) made 0.0 of Inf; "),
        ("rows", "test_rows_that_it_says_are_apart_are_apart", "rounding(rows).by_rows is true, and a row "),
        ("gradient", "test_the_gradient_passes_straight_through", "the gradient through rounding(gradient) is not "),
    ],
)  # fmt: skip
def test_a_wrong_quantizer(wrong: str, test: str, message: str) -> None:
    arguments = {"dtype": torch.bfloat16, "device": "cpu"} if test.startswith("test_shape") else {}

    getattr(QuantizerSuite(), test)(Rounding(), **arguments)
    with pytest.raises((AssertionError, qsim.QsimError)) as error:
        getattr(QuantizerSuite(), test)(Rounding(wrong=wrong), **arguments)

    assert str(error.value).startswith(message)


class Halves(qsim.Calibrator):
    """A calibrator with half of the largest magnitude of all blocks together; zero where one is not finite."""

    name = "halves"

    def range(self, blocks: Tensor, error: Any, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        high = (blocks.abs().max() / 2).nan_to_num(0.0, 0.0).expand(blocks.shape[:-1])
        return -high, high


@pytest.mark.parametrize(
    ("test", "arguments", "message"),
    [
        ("test_blocks_do_not_see_each_other", {}, "halves: a block's range sees the others"),
        ("test_a_block_that_is_not_finite_has_no_finite_range", {"special": torch.nan},
         "halves gives 0.0 for a block with nan; it must show"),
    ],
)  # fmt: skip
def test_a_wrong_calibrator(test: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(CalibratorSuite(), test)(Halves(), **arguments)


class Multiplying(qsim.Arithmetic):
    """A float product, wrong in the way that `wrong` says."""

    name = "multiplying"
    wrong: str = ""

    def check(self, quantizers: Any) -> None:
        if self.wrong == "quantizers":
            raise qsim.RecipeError("it takes nothing")

    def multiply(self, left: qsim.QuantizedRows, right: qsim.QuantizedRows) -> Tensor:
        x, w = left.values, right.values.transpose(-1, -2)
        match self.wrong:
            case "dtype":
                return (x @ w).float()
            case "shape":
                return (x @ w).transpose(-1, -2)
            case "operands":
                return x.mul_(2) @ w
            case "random":
                return x @ w + torch.rand(())
            case "batches":
                return x @ w - (x @ w).mean()
            case "nan":
                return (x @ w).nan_to_num(0.0)
            case "views":
                return (1 + right.values.is_contiguous()) * x @ w
            case "large":
                return x @ w + torch.inf
        return x @ w


@pytest.mark.parametrize(
    ("wrong", "test", "arguments", "message"),
    [
        ("quantizers", "it_takes_these_quantizers", {}, "multiplying(quantizers) refuses "),
        ("dtype", "rows_by_rows_are_a_matrix_in_their_dtype", {"dtype": torch.bfloat16},
         "multiplying(dtype) made (6, 5) torch.float32 of (6, 40) and (5, 40) torch.bfloat16; expected (6, 5) torch.bfloat16"),
        ("shape", "rows_by_rows_are_a_matrix_in_their_dtype", {"dtype": torch.float32},
         "multiplying(shape) made (5, 6) torch.float32 "),
        ("operands", "the_operands_are_left_alone", {}, "multiplying(operands) changed its operands; "),
        ("random", "it_gives_the_same_each_time_and_draws_no_global_random_numbers", {},
         "multiplying(random) multiplies with torch's global random numbers; use a torch.Generator with a seed"),
        ("batches", "batches_are_multiplied_one_by_one", {}, "multiplying(batches): a batch depends on the others"),
        ("nan", "nan_shows", {}, "multiplying(nan) made [0.0, 0.0, 0.0, 0.0, 0.0] of a row with NaN; "),
        ("views", "rows_that_are_not_contiguous_are_multiplied_like_their_copy", {},
         "multiplying(views) multiplies rows that are not contiguous differently"),
        ("large", "a_simulated_model_pickles_recomputes_and_is_restored", {},
         "a model under multiplying(large) gives NaN or Inf"),
    ],
)  # fmt: skip
def test_a_wrong_arithmetic(wrong: str, test: str, arguments: dict[str, Any], message: str) -> None:
    getattr(ArithmeticSuite(), f"test_{test}")(Multiplying(), **arguments)

    with pytest.raises((AssertionError, pytest.fail.Exception)) as error:
        getattr(ArithmeticSuite(), f"test_{test}")(Multiplying(wrong=wrong), **arguments)

    assert str(error.value).startswith(message)


class TestReferences(ArithmeticSuite):
    text = ("float32", "auto")


class Rate(qsim.Hardware):
    """A rate of multiplications, wrong in the way that `wrong` says."""

    name = "rate"
    wrong: str = ""

    def cost(self, work: Sequence[qsim.SiteWork]) -> qsim.Cost:
        seconds = float(sum(one.product.multiplications for one in work))
        match self.wrong:
            case "infinite":
                seconds = float("inf")
            case "fewer":
                seconds = 1 / (1 + seconds)
            case "idle":
                seconds += 1
        sites = {"elsewhere": {"seconds": seconds}} if self.wrong == "sites" else {}
        return qsim.Cost(
            totals={"seconds": seconds}, sites=sites, assumptions=[] if self.wrong == "silent" else ["one"]
        )


@pytest.mark.parametrize(
    ("wrong", "test", "message"),
    [
        ("infinite", "the_cost_of_two_layers_is_finite", "rate(infinite) gives {'seconds': inf}; "),
        ("sites", "sites_are_those_of_the_work", "rate(sites) names sites ['elsewhere'] "),
        ("silent", "it_says_under_which_conditions", "rate(silent) states no assumptions "),
        ("fewer", "more_rows_do_not_cost_less", "rate(fewer): ['seconds'] of 400 rows "),
        ("idle", "no_work_takes_no_time_and_no_energy", "rate(idle) prices no work at {'seconds': 1.0}"),
    ],
)
def test_wrong_hardware(wrong: str, test: str, message: str) -> None:
    arguments = {"quantized": True} if "finite" in test else {}
    getattr(HardwareSuite(), f"test_{test}")(Rate(), **arguments)

    with pytest.raises(AssertionError) as error:
        getattr(HardwareSuite(), f"test_{test}")(Rate(wrong=wrong), **arguments)

    assert str(error.value).startswith(message)


class Shift(qsim.Transform):
    """A transform that adds random numbers to weights, halves an unknown weight, and reports nothing."""

    name = "shift"

    def apply(self, model: nn.Module, context: Any) -> None:
        for weight in context.weights():
            weight.parameter.add_(100 * torch.rand_like(weight.parameter))
        model.train()


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_it_says_what_it_did", r"^shift reports nothing; call context.report\(layer, …\) for each layer$"),
        ("test_the_model_still_works", r"^after shift the outputs are .* times their size away from what they were$"),
        (
            "test_it_keeps_names_shapes_dtypes_and_mode",
            r"^shift leaves module '' with another name, shape, dtype or mode$",
        ),
        (
            "test_it_gives_the_same_each_time_and_draws_no_global_random_numbers",
            "^shift works with torch's global random ",
        ),
    ],
)
def test_a_wrong_transform(test: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(TransformSuite(), test)(Shift())


class Nothing(qsim.Adapter):
    """An adapter that ignores its directory, and gives a random linear layer."""

    name = "nothing"

    def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
        return qsim.LoadedModel(nn.Linear(4, 4))


def test_a_wrong_adapter(tmp_path: Path) -> None:
    suite, adapter = AdapterSuite(), Nothing()

    with pytest.raises(
        AssertionError, match=r"^nothing loads 'the model' in training mode; end in .eval\(\)$|^nothing loads"
    ):
        suite.test_a_model_is_loaded_in_eval_mode_and_the_dtype_that_is_asked_for(adapter, "x", torch.bfloat16)
    with pytest.raises(AssertionError, match="^nothing loads another (weight|bias) the second time: is it read at all"):
        suite.test_the_same_is_loaded_each_time(adapter, "x")
    with pytest.raises(pytest.fail.Exception, match="^nothing loads an empty directory; raise a qsim_core.ModelError"):
        suite.test_an_empty_directory_is_one_line(adapter, tmp_path)


class Constant(qsim.Evaluator):
    """An evaluator that gives 1 for every model, and the first batch's size."""

    name = "constant"
    metric = "score"

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> dict[str, float]:
        loaded.model.train()
        return {"one": 1.0, "size": run.batch_size}

    def read(self, source: str, split: str = "test") -> qsim.Data:
        return qsim.Data.of_text(source, Path(source).read_text())


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_metrics_are_numbers_by_name", r"^constant shows 'score' first, which is none of \['one', 'size'\]$"),
        ("test_the_batch_size_says_nothing_but_how_fast", "^constant gives .* for a batch size of 1, .* for 3"),
        ("test_the_model_and_the_data_are_left_alone", "^constant leaves the model in another mode, or with hooks$"),
        ("test_it_sees_what_quantizing_does", "^constant gives .* whatever the weights are$"),
    ],
)
def test_a_wrong_evaluator(test: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(EvaluatorSuite(), test)(Constant())


def test_an_evaluator_that_lets_an_error_through(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"^constant.read ends in FileNotFoundError where there is no file"):
        EvaluatorSuite().test_data_that_are_not_there_are_one_line(Constant(), tmp_path)


def test_what_is_registered_by_hand_has_no_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    host = qsim.Host(discover=False)
    host.register(Rounding, name="by_hand")
    monkeypatch.setattr("qsim_core.testing.component.installed", lambda: host)

    with pytest.raises(
        AssertionError, match="^rounding was registered by hand; its plugin needs an entry point in group"
    ):
        QuantizerSuite().test_it_is_found_through_an_entry_point(Rounding())


def test_options_that_take_anything_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loose(Rounding):
        """An option of any type."""

        name = "loose"
        anything: Any = None

    host = qsim.Host(discover=False)
    host.register(Loose)
    monkeypatch.setattr("qsim_core.testing.component.installed", lambda: host)

    with pytest.raises(
        AssertionError, match=r"^loose takes anything=\[\[\[true\]\]\]; give the option a type that refuses"
    ):
        QuantizerSuite().test_its_options_are_checked(Loose())


def test_a_suite_runs_as_an_empty_subclass_and_says_what_is_missing(tmp_path: Path) -> None:
    """Run two suites in a separate process: one with a name that is not installed, one without a name."""
    import os
    import subprocess

    import forked

    (tmp_path / "test_missing.py").write_text(
        "from qsim_core.testing import QuantizerSuite\n\n\nclass TestMissing(QuantizerSuite):\n    text = 'missing'\n"
    )
    (tmp_path / "test_unnamed.py").write_text(
        "from qsim_core.testing import QuantizerSuite\n\n\nclass TestUnnamed(QuantizerSuite):\n    pass\n"
    )

    run = subprocess.run(
        [*forked.python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "."],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip

    assert 'TestUnnamed has to say what it tests, like text = "name"' in run.stdout
    assert "missing is not found: no quantizer 'missing'" in run.stdout
    assert "Is the distribution installed (pip install -e .)" in run.stdout
    assert "passed" not in run.stdout


def test_each_hook_has_a_suite() -> None:
    from qsim_core.components.hook_validation import HOOKS, base_of

    suites = (
        QuantizerSuite,
        CalibratorSuite,
        TransformSuite,
        AdapterSuite,
        EvaluatorSuite,
        ArithmeticSuite,
        OperationSuite,
        HardwareSuite,
    )

    assert [suite.base for suite in suites] == [base_of(hook) for hook in HOOKS]
    assert all(issubclass(suite, ComponentSuite) for suite in suites)
