"""A bench loads a model once, and gives each recipe the numbers that a run of its own has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qsim_core as qsim

TEXT = str(Path(__file__).parent.parent / "README.md")


def numbers(result: qsim.Result) -> dict[str, Any]:
    return result.model_dump(exclude={"seconds": True, "cached": True, "transforms": {"__all__": {"seconds"}}})


def test_each_recipe_on_a_bench_has_the_numbers_of_a_run_of_its_own(small: Path) -> None:
    recipes: list[dict[str, Any]] = [
        {"weights": "int4", "transforms": ["smoothquant"]},
        {"weights": "int6", "activations": "tensor(int8, static=true)"},
    ]
    bench, few = qsim.Bench(str(small)), qsim.Calibration(TEXT, samples=2, length=64)

    together = [bench.measure(one, TEXT, calibration=few, run=qsim.Run(limit=2)).result for one in recipes]

    alone = [
        qsim.evaluate({"model": str(small), **one}, data=TEXT, calibration=few, run=qsim.Run(limit=2))
        for one in recipes
    ]
    assert [numbers(result) for result in together] == [numbers(result) for result in alone]


def test_a_model_is_afterwards_what_was_loaded(small: Path) -> None:
    bench, few = qsim.Bench(str(small)), qsim.Calibration(TEXT, samples=2, length=64)

    bench.measure({"weights": "int3", "transforms": ["smoothquant"]}, TEXT, calibration=few, run=qsim.Run(limit=1))

    assert bench.intact


def test_a_seed_of_calibration_draws_other_samples_of_the_same_baseline(small: Path) -> None:
    recipe = {"weights": "int4", "activations": "tensor(int8, static=true)"}
    bench = qsim.Bench(str(small))

    first, second = (
        bench.measure(
            recipe, TEXT, calibration=qsim.Calibration(TEXT, samples=1, length=16, seed=seed), run=qsim.Run(limit=2)
        ).result
        for seed in (0, 1)
    )

    assert first.baseline == second.baseline
    assert first.simulated != second.simulated


def test_a_record_has_the_seed_of_its_calibration() -> None:
    recipe = {"model": "opt-tiny", "activations": "tensor(int8, static=true)"}

    result = qsim.evaluate(recipe, calibration=qsim.Calibration(samples=1, length=16, seed=7), run=qsim.Run(limit=1))

    assert result.calibration is not None
    assert result.calibration.seed == 7


def test_a_recipe_of_another_model_is_an_error() -> None:
    with pytest.raises(qsim.RecipeError, match="this bench has opt-tiny"):
        qsim.Bench("opt-tiny").measure({"model": "bert-tiny", "weights": "int4"})


def test_matmuls_are_found_in_one_forward_for_checks_transforms_and_audit(small: Path) -> None:
    bench, forwards = qsim.Bench(str(small)), [0]

    def count(*_: Any) -> None:
        forwards[0] += 1

    bench.load().model.register_forward_pre_hook(count)
    bench.measure({"weights": "int4"}, TEXT, run=qsim.Run(limit=1))

    assert forwards == [4]  # finding, the baseline, the audit, the recipe


def test_a_model_whose_baseline_fails_is_left_as_it_was(small: Path) -> None:
    bench = qsim.Bench(str(small))
    model = bench.load().model

    recipe = {"weights": "int4"}
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(KeyboardInterrupt):
        bench.measure(recipe, TEXT, run=qsim.Run(limit=1, track=_interrupted))

    assert seen == [1]
    assert bench.intact
    assert qsim.simulate(model, recipe).restore() is model


def _interrupted(items: Any, total: int, description: str) -> Any:
    raise KeyboardInterrupt
