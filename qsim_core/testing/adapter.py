"""The suite of hook `qsim_adapters`: what is known about one model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qsim_core.components.component import Component
from qsim_core.components.host import installed
from qsim_core.errors import ModelError
from qsim_core.evaluation.adapter import Adapter, LoadedModel
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.locate import locate
from qsim_core.simulation.simulation import simulate
from qsim_core.testing.component import ComponentSuite, identical
from qsim_core.testing.model import scaled
from qsim_core.transforms.forward import as_in_evaluation, call

DTYPES = [torch.float32, torch.bfloat16]
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


class AdapterSuite(ComponentSuite):
    """`load(model, dtype)` gives a model that runs, or one line. A subclass writes `checkpoint`, and may `example`."""

    base: ClassVar[type[Component]] = Adapter

    def checkpoint(self, folder: Path) -> str | Path:
        """Write a small model of the family into an empty directory; give what `load` takes: it, or a model's name."""
        pytest.fail(f"{type(self).__name__} has to write a small model: def checkpoint(self, folder)", pytrace=False)

    def example(self, loaded: LoadedModel) -> Any:
        """One small batch as arguments of the model's forward; by default eight tokens, as `input_ids`."""
        return {"input_ids": torch.arange(4, 12).view(1, -1)}

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        """The source that `load` takes."""
        return str(self.checkpoint(tmp_path))

    def test_its_models_are_found_by_their_directory(self, component: Any, source: str) -> None:
        located = locate(source, installed())

        assert component in located.components, (
            f"{source} is found with {located.adapter}, not with {component}; its config.json names a family that is "
            f"neither the adapter's name nor among its `families`"
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
    def test_a_model_is_loaded_in_eval_mode_and_the_dtype_that_is_asked_for(
        self, component: Any, source: str, dtype: torch.dtype
    ) -> None:
        loaded = component.load(source, dtype)

        assert isinstance(loaded, LoadedModel), f"{component}.load gave {type(loaded).__name__}, no LoadedModel"
        training = [name for name, module in loaded.model.named_modules() if module.training]
        assert training == [], f"{component} loads {training[0] or 'the model'!r} in training mode; end in .eval()"
        others = {n: p.dtype for n, p in loaded.model.named_parameters() if p.is_floating_point() and p.dtype != dtype}
        assert others == {}, f"{component} loads {others} where {dtype} was asked for"
        bad = [name for name, p in loaded.model.named_parameters() if not p.isfinite().all()]
        assert bad == [], f"{component} loads {bad[0]} with NaN or Inf"

    def test_the_same_is_loaded_each_time(self, component: Any, source: str) -> None:
        first, again = (component.load(source, torch.float32).model.state_dict() for _ in range(2))

        differing = [n for n in first.keys() | again.keys() if n not in first or not identical(first[n], again[n])]
        assert differing == [], f"{component} loads another {differing[0]} the second time: is it read at all?"

    def test_every_matmul_but_those_to_skip_is_quantized(self, component: Any, source: str) -> None:
        loaded = component.load(source, torch.float32)
        example = self.example(loaded)

        simulation = simulate(
            loaded.model,
            weights=scaled(8, "channel"),
            activations=scaled(8, "token"),
            skip=component.skip,
            example=example,
        )

        audit = simulation.audit()
        assert audit.uncovered == [], f"of a model that {component} loads {audit.uncovered} is met by no site"
        assert audit.covered > 0, f"{component}.skip leaves every matmul alone: {component.skip}"
        with as_in_evaluation(loaded.model):
            call(loaded.model, example)

    def test_what_it_declares_is_there(self, component: Any, source: str) -> None:
        model = component.load(source, torch.float32).model
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))

        for norm, readers in (component.structure(model) or {}).items():
            assert norm in modules, f"{component}.structure names a norm {norm!r} that the model has not"
            missing = [name for name in readers if name not in parameters]
            assert missing == [], f"{component}.structure names a weight {missing[0]!r} that the model has not"

    def test_its_evaluator_is_one(self, component: Any, source: str) -> None:
        """Looked at where it is installed."""
        text = component.evaluator_of(source)
        if text is None or text.partition("(")[0] not in installed().components():
            pytest.skip("it has none, or none that is installed")

        assert isinstance(installed().parse(text), Evaluator), f"{component}.evaluator_of gives {text}, no evaluator"

    def test_models_with_names_say_what_they_are(self, component: Any) -> None:
        silent = [name for name, model in component.models().items() if not model.doc]

        assert silent == [], f"{component}.models() has {silent[0]!r} without a word on what it is"

    def test_an_empty_directory_is_one_line(self, component: Any, tmp_path: Path) -> None:
        self.refused(component, str(tmp_path), "an empty directory")

    def test_a_directory_that_is_not_there_is_one_line(self, component: Any, tmp_path: Path) -> None:
        self.refused(component, str(tmp_path / "missing"), "a directory that is not there")

    def test_damaged_weights_are_one_line(self, component: Any, source: str, tmp_path: Path) -> None:
        patterns = (*WEIGHTS, *(f"*{ending}" for ending in component.endings))
        files = [file for pattern in patterns for file in sorted(tmp_path.rglob(pattern))]
        if not files:
            pytest.skip("its checkpoint is no directory with files of weights")
        files[0].write_bytes(files[0].read_bytes()[:100])

        self.refused(component, source, "weights that are cut off")

    @staticmethod
    def refused(adapter: Any, source: str, what: str) -> None:
        """Hold an adapter to a `ModelError` of one line."""
        try:
            adapter.load(source, torch.float32)
        except ModelError as error:
            assert "\n" not in str(error), f"{adapter} says in more than one line what is wrong with {what}: {error}"
            return
        except Exception as error:
            pytest.fail(f"{adapter} ends in {type(error).__name__} on {what}: {error}; raise a qsim_core.ModelError")
        pytest.fail(f"{adapter} loads {what}; raise a qsim_core.ModelError that says what is missing")
