"""A specification says which cells a study has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qsim_study import Specification
from qsim_study.lists import split

import qsim_core as qsim
from qsim_core.components.host import installed


def labels(**values: Any) -> list[str]:
    return [cell.label for cell in Specification.of(values).cells(installed())]


def test_a_grid_has_every_combination() -> None:
    found = labels(models=["opt-tiny"], vary={"weights": ["int4", "e2m1"], "activations": ["int8", "e4m3"]})

    assert found == [
        "model=opt-tiny, weights=int4, activations=int8",
        "model=opt-tiny, weights=int4, activations=e4m3",
        "model=opt-tiny, weights=e2m1, activations=int8",
        "model=opt-tiny, weights=e2m1, activations=e4m3",
    ]


def test_cells_of_a_model_stand_together() -> None:
    found = labels(vary={"weights": ["int4", "int8"], "model": ["opt-tiny", "bert-tiny"]})

    assert [label.split(",")[0] for label in found] == ["model=opt-tiny"] * 2 + ["model=bert-tiny"] * 2


def test_one_model_and_one_value_need_no_list() -> None:
    found = labels(models="opt-tiny", vary={"weights": "int4"})

    assert found == labels(models=["opt-tiny"], vary={"weights": ["int4"]})


def test_recipes_are_named_and_share_what_they_have_in_common() -> None:
    study = Specification.of(
        {
            "models": ["opt-tiny"],
            "recipe": {"activations": "int8"},
            "recipes": {"a": {"weights": "int4"}, "b": {"weights": "int8"}},
        }
    )

    a, b = study.cells(installed())

    assert (a.recipe_label, b.recipe_label) == ("a", "b")
    assert [cell.recipe["activations"] for cell in (a, b)] == ["token(int8)"] * 2
    assert [cell.recipe["weights"] for cell in (a, b)] == ["channel(int4)", "channel(int8)"]


def test_conditions_keep_and_drop_cells() -> None:
    grid = {"weights": ["int4", "int8"], "activations": ["int8", "e4m3"]}

    kept = labels(models=["opt-tiny"], vary=grid, where=[{"weights": "int4"}, {"activations": ["e4m3", "e5m2"]}])
    left = labels(models=["opt-tiny"], vary=grid, **{"except": [{"weights": "int8", "activations": "int8"}]})

    assert (
        kept
        == left
        == [
            "model=opt-tiny, " + rest
            for rest in (
                "weights=int4, activations=int8",
                "weights=int4, activations=e4m3",
                "weights=int8, activations=e4m3",
            )
        ]
    )


def test_an_option_inside_a_component_varies() -> None:
    study = Specification.of(
        {"models": ["opt-tiny"], "recipe": {"weights": "abfp(int4)"}, "vary": {"abfp.n": [16, 32]}}
    )

    assert [cell.recipe["weights"] for cell in study.cells(installed())] == ["abfp(int4, n=16)", "abfp(int4, n=32)"]


def test_a_plugin_means_what_the_option_means() -> None:
    study = Specification.of(
        {"models": ["opt-tiny"], "recipe": {"plugin": "abfp"}, "vary": {"weights": ["int4", "int6"]}}
    )

    recipes = [cell.recipe for cell in study.cells(installed())]

    assert [recipe["weights"] for recipe in recipes] == ["abfp(int4)", "abfp(int6)"]
    assert {recipe["outputs"] for recipe in recipes} == {"cast(bf16)"}


def test_circumstances_vary_too() -> None:
    study = Specification.of(
        {"models": ["opt-tiny"], "recipe": {"weights": "int4"}, "vary": {"calibration_seed": [0, 1]}, "limit": 4}
    )

    around = [cell.circumstances for cell in study.cells(installed())]

    assert [(one.calibration_seed, one.limit) for one in around] == [(0, 4), (1, 4)]


def test_a_file_may_name_hardware(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("models: [opt-tiny]\non: [h100]\n")  # a key that YAML 1.1 reads as true

    assert Specification.read(tmp_path / "study.yaml").circumstances.on == ("h100",)


def test_a_file_that_is_not_yaml_is_called_a_study(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("models: [opt-tiny")

    with pytest.raises(qsim.RecipeError, match=f"^study {file} is not YAML: expected ',' or ']', .*line 1, column 18"):
        Specification.read(file)


def test_a_specification_is_read_back_from_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "formats.yaml"
    file.write_text("models: [opt-tiny]\nvary: {weights: [int4, int8]}\nlimit: 4\nexcept: [{weights: int8}]\n")

    study = Specification.read(file)

    assert study.name == "formats"
    assert Specification.of(study.said()) == study


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modles": ["opt-tiny"]}, "no key 'modles'; did you mean 'models'?"),
        ({"models": ["opt-tiny"], "vary": {"weihgts": ["int4"]}}, "no key 'weihgts'; did you mean 'weights'?"),
        ({"models": ["opt-tiny"], "vary": {"weights": ["int44"]}}, "weights=int44: .*did you mean 'int4'"),
        ({"models": ["opt-tiny"], "vary": {"weights": []}}, "weights has no values"),
        ({"models": [], "vary": {"weights": ["int4"]}}, "models has no values"),
        ({"models": ["opt-tiny"], "recipes": None}, "recipes has no values"),
        ({"models": ["opt-tiny"], "vary": {"weights": ["int4", "int4"]}}, "two cells are the same"),
        ({"models": ["opt-tiny"], "vary": {"weights": ["int4", "channel(int4)"]}}, "two cells are the same"),
        (
            {"models": ["opt-tiny"], "vary": {"weights": ["int4"]}, "where": [{"wieghts": "int4"}]},
            "condition names 'wieghts'",
        ),
        ({"models": ["opt-tiny"], "vary": {"weights": ["int4"]}, "where": [{"weights": "int8"}]}, "no cell meets"),
        ({"models": ["opt-tiny"], "vary": {"limit": [0], "weights": ["int4"]}}, "limit"),
        ({"models": ["opt-tiny"], "vary": {"abfp.n": [16]}, "recipe": {"weights": "int4"}}, "no component 'abfp'"),
    ],
)
def test_a_wrong_specification_is_an_error_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        Specification.of(values).cells(installed())


def test_commas_inside_brackets_do_not_split() -> None:
    assert split("abfp(int4, n=64),[gptq, awq],int8") == ["abfp(int4, n=64)", "[gptq, awq]", "int8"]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "docs" / "studies").glob("*.yaml")), ids=lambda file: file.stem
)
def test_a_study_of_the_docs_has_cells(file: Path) -> None:
    assert len(Specification.read(file).cells(installed())) > 1
