"""The suite of hook `qsim_evaluators`: what turns a model and data into metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import qsim_core.testing.model as small
from qsim_core.components.component import Component
from qsim_core.errors import DataError, QsimError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Data
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.metrics import Metrics
from qsim_core.testing.component import ComponentSuite, global_randomness_untouched, identical, one_line
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_core.transforms.run import Run


class EvaluatorSuite(ComponentSuite):
    """`evaluate(loaded, data, run)` gives the same numbers for the same model, data and run, and changes none of it."""

    base: ClassVar[type[Component]] = Evaluator
    run: ClassVar[Run] = Run(batch_size=3)
    limit: ClassVar[int] = 2
    """Fewer samples than the data have, and as many as it takes."""

    def loaded(self) -> LoadedModel:
        """A model that it fits, the same each time; by default a language model with letters for tokens."""
        return small.loaded()

    def data(self, evaluator: Any) -> Data:
        """The data to measure on, at least two samples: by default the evaluator's own, or a text."""
        return evaluator.default_data() or small.text()

    def measured(self, evaluator: Any, loaded: LoadedModel | None = None, **changes: Any) -> dict[str, float]:
        """Its metrics of a model, as `qsim evaluate` would ask for them."""
        loaded = loaded or self.loaded()
        metrics: dict[str, float] = evaluator.evaluate(loaded, self.data(evaluator), replace(self.run, **changes))
        return metrics

    def test_metrics_are_numbers_by_name(self, component: Any) -> None:
        metrics = self.measured(component)

        assert isinstance(metrics, dict) and metrics, f"{component} gives {metrics!r}, no metrics by name"
        for name, value in metrics.items():
            assert isinstance(name, str) and isinstance(value, int | float), f"{component} gives {name!r}: {value!r}"
            assert not math.isnan(value), f"{component} gives {name} NaN for a model that works"
        first = type(component).metric
        assert not first or first in metrics, f"{component} shows {first!r} first, which is none of {list(metrics)}"

    def test_it_gives_the_same_each_time_and_draws_no_global_random_numbers(self, component: Any) -> None:
        models = [self.loaded(), self.loaded()]

        with global_randomness_untouched(component, "works"):
            first, again = (self.measured(component, loaded) for loaded in models)

        assert dict(first) == dict(again), f"{component} gives {dict(again)} the second time, {dict(first)} before"

    def test_the_batch_size_says_nothing_but_how_fast(self, component: Any) -> None:
        whole, single = self.measured(component), self.measured(component, batch_size=1)

        assert single == pytest.approx(dict(whole), rel=1e-3, abs=1e-5), (
            f"{component} gives {dict(single)} for a batch size of 1, {dict(whole)} for {self.run.batch_size}"
        )

    def test_a_limit_is_kept(self, component: Any) -> None:
        metrics = self.measured(component, limit=self.limit)

        assert metrics, f"{component} gives no metrics under a limit of {self.limit}"
        assert not isinstance(metrics, Metrics) or metrics.size <= self.limit, (
            f"{component} has {metrics.size} samples under a limit of {self.limit}"
        )

    def test_the_model_and_the_data_are_left_alone(self, component: Any) -> None:
        loaded, data = self.loaded(), self.data(component)
        weights = {name: t.clone() for name, t in _state(loaded).items()}
        modes = _modes(loaded)

        first, again = (component.evaluate(loaded, data, self.run) for _ in range(2))

        changed = [name for name, t in _state(loaded).items() if not identical(t, weights[name])]
        assert changed == [], f"{component} changed {changed[:1]} of the model"
        assert _modes(loaded) == modes, f"{component} leaves the model in another mode, or with hooks"
        assert dict(first) == dict(again), f"{component} gives {dict(again)} on the same data, {dict(first)} before"

    def test_it_sees_what_quantizing_does(self, component: Any) -> None:
        """The same model with its weights drowned in noise has other metrics, compared with the model as it is."""
        before = self.measured(component)
        moved = self.loaded()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in moved.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator).to(p) * (3 * p.square().mean().sqrt()))

        after = self.measured(component, moved, reference=_outputs(before))

        assert dict(after) != dict(before), f"{component} gives {dict(before)} whatever the weights are"

    def test_outputs_that_are_not_finite_have_no_score(self, component: Any) -> None:
        before, broken = self.measured(component), self.loaded()
        with torch.no_grad():
            for p in broken.model.parameters():
                p.fill_(math.nan)

        found = component.measure(broken, self.data(component), replace(self.run, reference=_outputs(before)))

        first = type(component).metric or next(iter(found))
        assert math.isnan(found[first]), f"{component} gives {first} {found[first]} where every output is NaN"

    def test_what_its_samples_say_can_be_said_without_each(self, component: Any) -> None:
        metrics = self.measured(component)
        if not isinstance(metrics, Metrics) or metrics.size == 0:
            pytest.skip("its metrics are no means over samples, so results have no confidence intervals")

        assert metrics.size > 1, f"{component} has {metrics.size} samples; the suite's data should give it more"
        known = metrics.left_out().keys()
        assert known <= metrics.keys(), f"{component}: of_means gives {sorted(known)}, not what was measured"

    def test_it_says_what_is_measured_in_one_line(self, component: Any) -> None:
        protocol = component.protocol(self.loaded())

        assert protocol and "\n" not in protocol, f"{component}.protocol gives {protocol!r}, no sentence on one line"

    def test_its_example_runs(self, component: Any) -> None:
        loaded = self.loaded()
        example = component.example(loaded, self.data(component))
        if example is None:
            pytest.skip("it has no example; sites are found in the first forward")

        with as_in_evaluation(loaded.model):
            call(loaded.model, example)

    def test_its_calibration_batches_run_and_are_drawn_by_their_seed(self, component: Any) -> None:
        loaded, data = self.loaded(), self.data(component)
        try:
            first, again = (component.calibration(loaded, data, 2, None, seed) for seed in (1, 1))
        except DataError as error:
            assert "\n" not in str(error), f"{component} makes no batches, and says so in more than one line: {error}"
            return

        assert len(first) == 2, f"{component} makes {len(first)} calibration batches of 2"
        assert _same(first, again), f"{component} draws other batches for the same seed"
        with as_in_evaluation(loaded.model):
            for batch in first:
                call(loaded.model, batch)

    def test_a_model_in_bfloat16_is_measured(self, component: Any) -> None:
        loaded = self.loaded()
        loaded.model.to(torch.bfloat16)

        assert self.measured(component, loaded), f"{component} gives no metrics of a model in bfloat16"

    def test_data_that_are_not_there_are_one_line(self, component: Any, tmp_path: Path) -> None:
        source = str(tmp_path / "missing.txt")
        try:
            component.read(source)
        except QsimError as error:
            assert "\n" not in str(error), f"{component} says in more than one line that data are missing: {error}"
            return
        except Exception as error:
            pytest.fail(f"{component}.read ends in {type(error).__name__} where there is no file: {error}")
        pytest.fail(f"{component}.read reads {source}, which is not there; raise a qsim_core.DataError")

    def test_a_model_without_what_prepares_its_inputs_is_measured_or_one_line(self, component: Any) -> None:
        bare, data = LoadedModel(self.loaded().model), self.data(component)

        one_line(
            component, lambda: component.evaluate(bare, data, self.run), "on a model without tokenizer or processor"
        )


def _state(loaded: LoadedModel) -> dict[str, Tensor]:
    return loaded.model.state_dict()


def _outputs(metrics: dict[str, float]) -> Any:
    return getattr(metrics, "outputs", None)


def _same(first: Any, second: Any) -> bool:
    """Tell if two nested collections hold the same tensors and values."""
    pairs = list(zip(*map(tree_leaves, (first, second)), strict=True))
    return all(
        identical(a, b) if isinstance(a, Tensor) else a == b for a, b in (map(_state_of, pair) for pair in pairs)
    )


def _state_of(leaf: Any) -> Any:
    return leaf.get_state() if isinstance(leaf, torch.Generator) else leaf


def _modes(loaded: LoadedModel) -> dict[str, Any]:
    return {
        name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in loaded.model.named_modules()
    }
