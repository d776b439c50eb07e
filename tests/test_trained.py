"""The state of sites is saved, read back and bound to its recipe. A directory names the recipe of its training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qsim_finetune.trained import STATE, Trained, read_state, write_state
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main

Make = Callable[..., Any]
ZOO = Path(__file__).parent.parent / "plugins" / "zoo" / "qsim_zoo" / "models"
PARTS: dict[str, Any] = {
    "weights": "channel(int4, gradient=lsq)",
    "activations": "abfp(int8, n=8, symmetric=false, static=true)",
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 4))


def test_what_sites_hold_goes_through_a_file_and_gives_the_same_outputs(tmp_path: Path) -> None:
    model, again, x = linear(), linear(), noise(7, 20)
    simulation = qsim.simulate(model, **PARTS, calibration=[x])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if "qsim_steps" in name else 1)

    write_state(tmp_path / STATE, simulation.state_dict())
    qsim.simulate(again, **PARTS, example=noise(7, 20, seed=1), state=read_state(tmp_path / STATE))

    assert sorted(simulation.state_dict()) == [
        f"{site}:{what}" for site in "02" for what in ("calls", "input.scale", "input.zero", "weight.scale")
    ]
    assert torch.equal(again(x), model(x))


def test_loading_keeps_the_steps_that_an_optimizer_knows() -> None:
    model, x = linear(), noise(7, 20)
    simulation = qsim.simulate(model, **PARTS, calibration=[x])
    before, known = simulation.state_dict(), [p for name, p in model.named_parameters() if "qsim" in name]
    torch.optim.SGD(known, lr=1.0).step()
    with torch.no_grad():
        known[0].mul_(3)

    simulation.load_state_dict(before)

    assert all(a is b for a, b in zip(known, (p for n, p in model.named_parameters() if "qsim" in n), strict=True))
    assert torch.equal(known[0], before["0:weight.scale"])


def test_stochastic_rounding_goes_on_drawing_where_it_was() -> None:
    model, again, x = linear().train(), linear().train(), noise(7, 20)
    parts = {"activations": "token(int4(rounding=stochastic))", "example": x}
    simulation, later = qsim.simulate(model, **parts), qsim.simulate(again, **parts)
    first, second = model(x), None

    later.load_state_dict(simulation.state_dict())
    second = again(x)

    assert torch.equal(second, model(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"weights": "int4"},
            "this recipe has no place for the saved 0:input; it was saved under another recipe",
        ),
        (
            {**PARTS, "outputs": "tensor(int8, static=true)"},
            "the saved state lacks 0:output; it was saved under another recipe",
        ),
        (
            {**PARTS, "weights": "tensor(int4, gradient=lsq)"},
            "the saved scales of 0 (weight) are (6, 1, 1) and not (1, 1); they were saved under another recipe",
        ),
    ],
)
def test_what_another_recipe_has_saved_is_refused(parts: dict[str, Any], message: str) -> None:
    x = noise(7, 20)
    state = qsim.simulate(linear(), **PARTS, calibration=[x]).state_dict()
    simulation = qsim.simulate(linear(), **parts, calibration=[x])

    with pytest.raises(qsim.QsimError) as error:
        simulation.load_state_dict(state)

    assert str(error.value) == message


def test_state_needs_an_example() -> None:
    with pytest.raises(qsim.RecipeError, match=r"^what sites held belongs to sites that are known; give simulate an"):
        qsim.simulate(linear(), weights="int4", state={})


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            "hadamard",
            r"^a transform has left rotations at model\.decoder\.layers\.0\.self_attn\.q_proj; a model that",
        ),
        (
            "gptq",
            r"^a transform has put model\.decoder\.layers\.0\.fc1\.weight on its grid for good; a model that trains",
        ),
        ("rptq", r"^a transform has left quantizers of its own at model\.decoder\.layers\.0"),
    ],
)
def test_what_a_transform_leaves_beside_the_weights_cannot_be_saved(
    make: Make, ids: Tensor, transform: str, message: str
) -> None:
    simulation = qsim.simulate(
        make("opt"), weights="int4", activations="int4", transforms=[transform], calibration=[{"input_ids": ids}] * 4
    )

    with pytest.raises(qsim.QsimError, match=message):
        simulation.state_dict()


@pytest.mark.parametrize("transform", ["smoothquant", "awq", "bias_correction"])
def test_what_a_transform_does_to_weights_is_saved_with_them(make: Make, ids: Tensor, transform: str) -> None:
    parts: dict[str, Any] = {"weights": "int4", "activations": "tensor(int8, static=true)"}
    model, again, batch = make("opt"), make("opt"), {"input_ids": ids}
    simulation = qsim.simulate(model, **parts, transforms=[transform], calibration=[batch] * 8)

    again.load_state_dict(model.state_dict())
    qsim.simulate(again, **parts, example=batch, state=simulation.state_dict())

    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """opt-tiny, as if it had been trained under static scales. One of the scales has moved."""
    directory = tmp_path / "trained"
    shutil.copytree(ZOO / "opt-tiny", directory)
    recipe = qsim.Recipe(weights="int4", activations="tensor(int8, static=true)", skip=("lm_head",))  # type: ignore[arg-type]
    Trained(base="opt-tiny", recipe=recipe.record(), evaluator="perplexity").write(directory)
    loaded = qsim.Host().parse("opt.opt").load(str(directory), torch.float32)
    example = {"input_ids": torch.arange(4, 260).unsqueeze(0), "use_cache": False}
    state = qsim.simulate(loaded.model, recipe, calibration=[example]).state_dict()
    state["model.decoder.layers.0.fc1:input.scale"] *= 3
    write_state(directory / STATE, state)
    return directory


def evaluated(*arguments: Any) -> Any:
    outcome = CliRunner().invoke(main, ["evaluate", *map(str, arguments), "--limit", "2", "--json", "-"])
    assert outcome.exit_code == 0, outcome.output
    return qsim.Result.model_validate_json(outcome.stdout), outcome.stderr


def test_a_trained_directory_is_evaluated_under_its_recipe_with_what_its_sites_hold(trained: Path) -> None:
    result, _ = evaluated(trained)
    fresh, warning = evaluated("opt-tiny", "--weights", "int4", "--activations", "tensor(int8, static=true)")
    assert warning == ""

    assert result.recipe["activations"] == "tensor(int8, static=true)"
    assert result.calibration is None
    assert result.data.name == "zoo: Python's documentation, test split"
    assert result.baseline == fresh.baseline
    assert result.simulated["nll"] != fresh.simulated["nll"]


def test_its_record_runs_again_to_the_same_number(trained: Path, tmp_path: Path) -> None:
    result, _ = evaluated(trained)
    result.write(tmp_path / "result.json")

    outcome = CliRunner().invoke(main, ["evaluate", "--from", str(tmp_path / "result.json"), "--json", "-"])

    assert qsim.Result.model_validate_json(outcome.stdout).simulated == result.simulated


def test_another_recipe_leaves_what_its_sites_hold_aside_and_says_so(trained: Path) -> None:
    result, warning = evaluated(trained, "--weights", "int4")

    assert result.recipe["activations"] is None
    assert warning == (f"Warning: {trained} was trained under another recipe; what its sites learned is left aside\n")


def test_a_trained_model_runs_under_all_of_its_recipe_but_the_transforms() -> None:
    host, trained_under = (
        qsim.Host(),
        {"activations": "int8", "keys": "int4", "operations": {"softmax": {"output": "bf16"}}},
    )
    recipe = qsim.Recipe.of({**trained_under, "transforms": ["smoothquant"]}, host)
    record = Trained(base="opt-tiny", recipe=recipe.record(), evaluator="perplexity")

    assert qsim.Recipe.of(record.simulated(host), host).record() == qsim.Recipe.of(trained_under, host).record()
    assert record.fits(qsim.Recipe.of({**trained_under, "arithmetic": "float32"}, host), host)
    assert not record.fits(qsim.Recipe.of({**trained_under, "keys": "int8"}, host), host)


def test_a_record_that_is_none_is_one_line(trained: Path) -> None:
    (trained / "qsim.json").write_text("{}")

    outcome = CliRunner().invoke(main, ["evaluate", str(trained)])

    assert outcome.output == f"Error: {trained}/qsim.json is no record of a training: base is missing\n"


def test_a_state_that_is_broken_is_one_line(trained: Path) -> None:
    (trained / STATE).write_bytes(b"nothing")

    outcome = CliRunner().invoke(main, ["evaluate", str(trained), "--limit", "2"])

    assert outcome.exit_code == 1
    assert outcome.output.startswith(f"Error: cannot read {trained}/sites.safetensors, what the sites hold: ")
