"""Of several learning rates the one is taken that does best on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
from qsim_finetune.rates import losses_of, steps_of_a_trial
from test_finetuning import SHORT, qsim_, result

import qsim_core as qsim
from qsim_core.errors import TrainingError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_small(tmp_path_factory.mktemp("model") / "small")


def test_the_rate_with_the_least_loss_on_held_out_data_is_taken(small: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text((Path(__file__).parents[3] / "README.md").read_text()[:2000])

    finetuned = result(
        small, "--weights", "int4", *SHORT, "--steps", 10, "--lr", 0.3, "--lr", 1e-9, "--valid-data", held,
        "--output", tmp_path / "run",
    )  # fmt: skip

    assert list(finetuned.tried) == [0.3, 1e-9]
    assert finetuned.tried[1e-9] < finetuned.tried[0.3]
    assert finetuned.training.learning_rate == 1e-9
    assert max(entry.learning_rate for entry in finetuned.log) == pytest.approx(1e-9, rel=0.2)


def test_trials_that_were_made_are_not_made_again(tmp_path: Path) -> None:
    made: list[float] = []

    def trial(rate: float) -> float:
        made.append(rate)
        if rate == 2.0:
            raise TrainingError("step 1: the loss is nan")
        return rate

    first = losses_of([1.0, 2.0], trial, tmp_path)
    second = losses_of([1.0, 2.0, 3.0], trial, tmp_path)

    assert (first, second, made) == ({1.0: 1.0}, {1.0: 1.0, 3.0: 3.0}, [1.0, 2.0, 3.0])


def test_if_all_diverge_it_says_so(tmp_path: Path) -> None:
    def trial(rate: float) -> float:
        raise TrainingError("step 1: the loss is nan")

    with pytest.raises(qsim.QsimError, match=r"^the training diverges at each of the learning rates 0.1, 1.0$"):
        losses_of([0.1, 1.0], trial, tmp_path)


def test_a_trial_has_a_fifth_of_the_steps() -> None:
    assert steps_of_a_trial(300, 1000, 1.0, 8) == 60
    assert steps_of_a_trial(None, 100, 2.0, 8) == 5
    assert steps_of_a_trial(2, 100, 2.0, 8) == 1


@pytest.mark.parametrize("options", [["--lr", "1e-4", "--lr", "1e-3"], ["--valid-data", __file__]])
def test_several_rates_and_held_out_data_belong_together(options: list[str], small: Path, tmp_path: Path) -> None:
    outcome: Any = qsim_("finetune", small, "--weights", "int4", *SHORT, *options, "--output", tmp_path / "run")

    assert outcome.output.endswith(
        "Error: several learning rates and --valid-data, on which they are compared, belong together\n"
    )
