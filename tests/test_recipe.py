"""Recipes: texts become quantizers, and each mistake gets one clear line."""

from __future__ import annotations

import pytest

import qsim_core as qsim

YAML = """\
model: facebook/opt-125m
weights: abfp(int4)
activations: abfp(e4m3)
outputs: cast(bf16)
skip: [lm_head]
overrides:
  '*.fc2':
    activations: abfp(int8)
  '*:qk':
    weights: null
evaluate: perplexity(2048)
"""


def test_yaml_goes_in_and_comes_out() -> None:
    recipe = qsim.Recipe.from_yaml(YAML)

    assert recipe.to_yaml().replace("\n- lm_head", " [lm_head]") == YAML
    assert qsim.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_bare_format_takes_the_usual_scheme_of_its_place() -> None:
    recipe = qsim.Recipe.of({"weights": "int4", "activations": "e4m3", "outputs": "bf16"})

    assert str(recipe.weights) == "channel(int4)"
    assert str(recipe.activations) == "token(e4m3)"
    assert str(recipe.outputs) == "cast(bf16)"


def test_the_last_pattern_that_matches_wins_for_what_it_says() -> None:
    recipe = qsim.Recipe.of(
        {
            "weights": "int8",
            "activations": "int8",
            "overrides": {"*": {"weights": "int4"}, "*.fc2": {"activations": None}, "a.*": {"weights": "int3"}},
        }
    )

    plans = {name: recipe.plan([name]) for name in ("b.fc1", "b.fc2", "a.fc2")}

    assert {name: (str(plan.weight), str(plan.input)) for name, plan in plans.items()} == {
        "b.fc1": ("channel(int4)", "token(int8)"),
        "b.fc2": ("channel(int4)", "None"),
        "a.fc2": ("channel(int3)", "None"),
    }


def test_a_pattern_may_name_an_alias() -> None:
    recipe = qsim.Recipe.of({"activations": "int8", "skip": ["*:pv"]})

    assert recipe.plan(["attn:matmul.1", "attn:pv"]).skipped
    assert not recipe.plan(["attn:matmul.0", "attn:qk"]).skipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- weights", "a recipe is a mapping of keys to values, not list"),
        ("weigths: int4", "a recipe has no key 'weigths'; did you mean 'weights'? There are: activations, "
         "arithmetic, evaluate, keys, kv_cache, model, operations, outputs, overrides, probabilities, queries, skip, "
         "transforms, value_axis, values, weights"),
        ("path: int8", "a recipe has no key 'path' any more; it is called 'arithmetic' now"),
        ("kv_cache: int8\nkeys: int4", "recipe: kv_cache says keys and values; leave keys out"),
        ("weights: int4\nweights: int8", "recipe is not YAML: the key 'weights' stands there twice (line 1, column 1)"),
        ("weights: [int4", "recipe is not YAML: expected ',' or ']', but got '<stream end>' (line 1, column 15)"),
        ("weights: int99", "no quantizer 'int99'; did you mean 'int9'?"),
        ("weights: 4", "recipe: weights should be a quantizer or its text, not 4"),
        ("overrides: {'*.fc2': {weight: int4}}", "the override of '*.fc2' has no key 'weight'; did you mean 'weights'?"),
        ("value_axis: left", "recipe: value_axis should be 'tokens' or 'head', not 'left'"),
        ("transforms: [int4]", "'int4' is a format, not a transform (character 1 of 'int4')"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(qsim.QsimError) as error:
        qsim.Recipe.from_yaml(text)

    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_yaml_runs_no_code() -> None:
    with pytest.raises(qsim.RecipeError, match="could not determine a constructor for the tag"):
        qsim.Recipe.from_yaml("weights: !!python/object/apply:os.getcwd []")


def test_one_pattern_may_stand_alone() -> None:
    assert qsim.Recipe.from_yaml("skip: lm_head").skip == ("lm_head",)


def test_plain_data_are_evaluated_as_the_recipe_that_they_say() -> None:
    said = {"model": "opt-tiny", "weights": "int4"}

    plain, recipe = (qsim.evaluate(given, run=qsim.Run(limit=1)) for given in (said, qsim.Recipe.of(said)))

    assert plain.simulated == recipe.simulated
    with pytest.raises(qsim.RecipeError, match="^a recipe is a mapping of keys to values, not str$"):
        qsim.evaluate("opt-tiny")  # type: ignore[arg-type]


def test_fp32_is_float32() -> None:
    recipe = qsim.Recipe.of({"weights": "int4", "outputs": "fp32", "arithmetic": "fp32"})

    assert recipe == qsim.Recipe.of({"weights": "int4", "outputs": "float32", "arithmetic": "float32"})
