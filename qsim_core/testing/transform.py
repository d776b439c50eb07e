"""The suite of hook `qsim_transforms`: methods that rewrite a model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qsim_core.components.component import Component
from qsim_core.errors import CalibrationWarning
from qsim_core.formats.quantizer import Quantizer
from qsim_core.simulation.simulation import Simulation, simulate
from qsim_core.testing.component import CLONES, ComponentSuite, global_randomness_untouched, identical, noise, one_line
from qsim_core.testing.model import batches, gradients, language_model, scaled
from qsim_core.transforms.transform import Transform


@dataclass(frozen=True)
class Applied:
    """A model under a recipe with a transform, for the tests that look at it and change nothing."""

    model: nn.Module
    simulation: Simulation
    batches: list[Any]
    """The calibration data, after the transform has seen them."""
    logits: Tensor
    """The model's first output."""


_APPLIED: dict[tuple[type[object], Any], Applied] = {}
"""By suite and transform: a transform takes longer than a look at its model."""


class TransformSuite(ComponentSuite):
    """`apply(model, context)` changes a model in place, says what it did, and can be undone."""

    base: ClassVar[type[Component]] = Transform

    def model(self) -> nn.Module:
        """A model that it works on, the same each time; its forward gives `.logits`."""
        return language_model()

    def batches(self) -> list[Any]:
        """Calibration data: keyword arguments of the model, one sample each."""
        return batches()

    def quantizers(self) -> dict[str, Quantizer]:
        """The recipe's `weights`, `activations` and `outputs`."""
        return {"weights": scaled(4, "channel"), "activations": scaled(8, "token")}

    def simulated(self, transform: Any, model: nn.Module, **changes: Any) -> Simulation:
        """The model under the recipe with this transform."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            given: dict[str, Any] = {**self.quantizers(), "transforms": [transform], "calibration": self.batches()}
            return simulate(model, **given | changes)

    def applied(self, transform: Any) -> Applied:
        """The model under the recipe with this transform, made once for all tests that change nothing."""
        if (key := (type(self), transform)) not in _APPLIED:
            model, data = self.model(), self.batches()
            simulation = self.simulated(transform, model, calibration=data)
            _APPLIED[key] = Applied(model, simulation, data, self.logits(model))
        return _APPLIED[key]

    def logits(self, model: nn.Module) -> Tensor:
        """The model's output for the first batch."""
        with torch.no_grad():
            return model(**self.batches()[0]).logits  # type: ignore[no-any-return]

    def test_it_says_what_it_did(self, component: Any) -> None:
        """A layer that was changed has an error before and after, or a note; one that was not says why."""
        reports = self.applied(component).simulation.reports

        assert reports, f"{component} reports nothing; call context.report(layer, …) for each layer"
        silent = [report.layer for report in reports if report.after is None and not report.note]
        assert silent == [], f"{component} reports {silent[:1]} with neither an error nor a note"

    def test_the_model_still_works(self, component: Any) -> None:
        exact = self.logits(self.model())

        y = self.applied(component).logits

        error = float((y - exact).norm() / exact.norm())
        assert error < 1, f"after {component} the outputs are {error:.2g} times their size away from what they were"

    def test_it_keeps_names_shapes_dtypes_and_mode(self, component: Any) -> None:
        before = _look(self.model())

        after = _look(self.applied(component).model)

        changed = dict(before.items() ^ after.items())
        assert changed == {}, f"{component} leaves {sorted(changed)[0]} with another name, shape, dtype or mode"

    def test_it_gives_the_same_each_time_and_draws_no_global_random_numbers(self, component: Any) -> None:
        applied, model = self.applied(component), self.model()

        with global_randomness_untouched(component, "works"):
            self.simulated(component, model)

        first, second = applied.model.state_dict(), model.state_dict()
        differing = [name for name in first if not identical(first[name], second[name])]
        assert differing == [], f"{component} leaves something else in {differing[:1]} the second time"
        assert identical(applied.logits, self.logits(model)), f"the outputs after {component} differ the second time"

    def test_the_data_are_left_alone(self, component: Any) -> None:
        given = self.applied(component).batches

        for batch, before in zip(given, self.batches(), strict=True):
            assert all(identical(batch[key], value) for key, value in before.items()), f"{component} changed its data"

    def test_it_is_undone_bit_for_bit(self, component: Any) -> None:
        model = self.model()
        exact, before = self.logits(model), {name: t.clone() for name, t in model.state_dict().items()}

        self.simulated(component, model).restore()

        after = model.state_dict()
        left = [name for name in before if not identical(after[name], before[name])]
        assert left == [], f"after {component} restore() leaves {left[:1]} changed"
        assert identical(self.logits(model), exact), f"after {component} and restore() outputs differ"

    @pytest.mark.parametrize("clone", CLONES)
    def test_a_copied_model_computes_the_same(self, component: Any, clone: str) -> None:
        model = self.applied(component).model

        copied = CLONES[clone](model)
        assert identical(self.logits(copied), self.logits(model)), f"after {component} a model that was {clone} differs"

    def test_gradients_are_there_and_checkpointing_leaves_them_alone(self, component: Any) -> None:
        model: Any = self.applied(component).model
        if not hasattr(model, "checkpointing"):
            pytest.skip("this model has no attribute `checkpointing`")

        plain = gradients(model, self.batches()[0])
        model.checkpointing = True
        recomputed = gradients(model, self.batches()[0])
        model.checkpointing = False

        assert plain, f"after {component} no parameter has a gradient"
        differing = [name for name in plain if not identical(plain[name], recomputed[name])]
        assert differing == [], f"after {component} gradient checkpointing changes the gradient of {differing[:1]}"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
    def test_it_works_in_other_dtypes(self, component: Any, dtype: torch.dtype) -> None:
        model = self.model().to(dtype)

        self.simulated(component, model)

        y = self.logits(model)
        assert y.dtype == dtype and y.isfinite().all(), f"a model of {dtype} gives {y.dtype}, or NaN, after {component}"

    def test_without_calibration_data_it_works_or_says_so(self, component: Any) -> None:
        model = self.model()

        one_line(
            component,
            lambda: self.simulated(component, model, calibration=None, example=self.batches()[0]),
            "without calibration data",
        )

    def test_a_model_with_nothing_to_do_is_refused_or_done(self, component: Any) -> None:
        """One matrix, no bias, no norm; if it is refused, it stays as it was."""
        model = nn.Linear(16, 8, bias=False)
        weight, data = model.weight.detach().clone(), [noise(4, 16, seed=seed) for seed in range(8)]

        def act() -> None:
            try:
                self.simulated(component, model, calibration=data)
            except Exception:
                assert identical(model.weight.detach(), weight), f"{component} was refused and changed the model"
                raise

        one_line(component, act, "on a single matrix")


def _look(model: nn.Module) -> dict[str, Any]:
    """The parts of each tensor and module that a transform leaves alone, by name."""
    tensors = {name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    return tensors | {f"module {name!r}": module.training for name, module in model.named_modules()}
