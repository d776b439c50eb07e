"""Text <-> component."""

from __future__ import annotations

import json

import pytest
import yaml
from pydantic import Field

import qsim_core as qsim
from qsim_core.components.syntax import MAX_DEPTH, MAX_LENGTH


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int4", "int4"),
        ("int(4)", "int(4)"),
        ("int(bits=4, narrow=false)", "int(4, narrow=false)"),
        ("abfp", "abfp(int4)"),
        ("abfp(int4, n=64)", "abfp(int4)"),
        ("abfp( int(8) , 32, scale = none )", "abfp(int(8), n=32, scale=none)"),
        ("abfp(element=e4m3, scale=fp16)", "abfp(e4m3, scale=fp16)"),
        ("channel(int8)", "channel(int8)"),
        ("block(e2m1, 16, scale=e4m3)", "block(e2m1, n=16, scale=e4m3)"),
        ("scaled(int4, 64, scaled(e4m3, tensor))", "scaled(int4, block=64, scale=scaled(e4m3))"),
        ("scaled(int4, token)", "scaled(int4, block=token)"),
        ('scaled(int4, "token")', "scaled(int4, block=token)"),
        ("float(4, 3, specials=fn, saturate=True)", "float(4, mantissa=3, specials=fn, saturate=true)"),
        ("perplexity(seqlen=2048)", "perplexity(2048)"),
        ("core.cast(fp.bf16)", "cast(bf16)"),
        ("cast(\n    bf16\n)", "cast(bf16)"),
    ],
)
def test_a_text_and_its_component_say_the_same(text: str, canonical: str) -> None:
    component = qsim.parse(text)

    assert str(component) == canonical
    assert qsim.parse(canonical) == component


def test_every_installed_component_round_trips(host: qsim.Host) -> None:
    fillings = (
        "{0}",
        "{0}(int4)",
        "{0}(int4, 16)",
        "{0}(4)",
        "{0}(4, 3)",
        "{0}(16)",
        "{0}([-1, 0, 1])",
        "{0}([block(int4, 16), block(int8, 16)])",
        "{0}([[int8, 1e12]], 1e9)",
    )
    stuck = []
    for name in host.components():
        for filling in fillings:
            try:
                component = host.parse(filling.format(name))
            except qsim.SpecError:
                continue
            assert host.parse(str(component)) == component
            break
        else:
            stuck.append(name)

    assert stuck == []


class Odd(qsim.Evaluator):
    """Options of every plain type."""

    name = "odd"
    metric = "none"
    label: str = "x"
    ratio: float = 0.5
    on: bool = False
    names: tuple[str, ...] = ()
    size: int | None = 3
    inner: qsim.Quantizer | None = Field("int4")

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> dict[str, float]:
        return {"none": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"label": 'two words, a "quote" and (', "ratio": -1e-30},
        {"label": "none", "on": True, "size": None, "inner": None},
        {"label": "ünï", "ratio": float("inf"), "names": ("a", "b c", "true")},
        {"label": "", "names": ("64",), "size": -5},
    ],
)
def test_strings_numbers_booleans_lists_and_none_round_trip(options: dict[str, object]) -> None:
    host = qsim.Host()
    host.register(Odd)
    component = Odd(**options)  # type: ignore[arg-type]

    assert host.parse(str(component)) == component


def test_json_and_yaml_carry_the_same_text() -> None:
    recipe = qsim.Recipe.of({"weights": "abfp(int4, n=32)", "overrides": {"*.fc2": {"activations": "int8"}}})

    assert json.loads(recipe.model_dump_json())["weights"] == "abfp(int4, n=32)"
    assert yaml.safe_load(recipe.to_yaml()) == {
        "weights": "abfp(int4, n=32)",
        "overrides": {"*.fc2": {"activations": "token(int8)"}},
    }
    assert qsim.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert qsim.Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text names no component (character 1 of '')"),
        ("4", "expected a component, found 4 (character 1 of '4')"),
        ("int4, int8", "expected a component, found a list (character 1 of 'int4, int8')"),
        ("abfp(int4", "cannot be read: '(' was never closed (character 5 of 'abfp(int4')"),
        ("a + b", "expected a name, a number, a string or a call, found 'a + b' (character 1 of 'a + b')"),
        ("abfp(n=0)", "abfp: n should be greater than 0, not 0 (character 8 of 'abfp(n=0)')"),
        (
            "abfp(int4, n=7.5)",
            "abfp: n should be a valid integer, got a number with a fractional part, not 7.5 "
            "(character 14 of 'abfp(int4, n=7.5)')",
        ),
        ("int(-4)", "int: bits should be greater than or equal to 2, not -4 (character 5 of 'int(-4)')"),
        ("abfp(int4, m=3)", "abfp has no option 'm'. There are: element, gradient, n, range, rule, scale, static, symmetric (character 14 of 'abfp(int4, m=3)')"),
        (
            "abfp(elemnt=int4)",
            "abfp has no option 'elemnt'; did you mean 'element'? There are: element, gradient, n, range, rule, scale, static, symmetric "
            "(character 13 of 'abfp(elemnt=int4)')",
        ),
        ("abfp(int4, n=32, n=64)", "given 'n' twice (character 1 of 'abfp(int4, n=32, n=64)')"),
        ("abfp(int4, element=int8)", "abfp is given 'element' twice (character 20 of 'abfp(int4, element=int8)')"),
        ("cast(int4, 3)", "cast takes at most 1 option (character 12 of 'cast(int4, 3)')"),
        ("abfp(abfp)", "'abfp' is a quantizer, not a format (character 6 of 'abfp(abfp)')"),
        ("int4(8)", "'int4' is short for int(4); name the option to change (character 6 of 'int4(8)')"),
        ("int(int4(3))", "a component such as 'int4' does not fit here (character 5 of 'int(int4(3))')"),
        ("channel()", "channel: element is missing (character 1 of 'channel()')"),
        ("abfp(*x)", "expected a name, a number, a string or a call, found '*x' (character 6 of 'abfp(*x)')"),
        ("abfp(**x)", "`**` has no meaning here (character 1 of 'abfp(**x)')"),
        ("a.b.c", "expected a component's name, `name` or `plugin.name` (character 1 of 'a.b.c')"),
        ("scaled(bf16, 2147483648)", "scaled: a block has at most 2147483647 elements along an axis, not 2147483648 "
         "(character 1 of 'scaled(bf16, 2147483648)')"),
        ("abfp(n=18446744073709551616)", "a whole number has more than 64 bits (character 8 of 'abfp(n=18446744073709551616)')"),
        ("hadamard(9223372036854775808)", "hadamard: seed is beyond the integers of 64 bits "
         "(character 1 of 'hadamard(9223372036854775808)')"),
        ("hadamard(18446744073709551616)", "a whole number has more than 64 bits "
         "(character 10 of 'hadamard(18446744073709551616)')"),
        ("float(3, 2, bias=-1000)", "float: bias should be greater than or equal to -512, not -1000 "
         "(character 18 of 'float(3, 2, bias=-1000)')"),
        ("float(1, mantissa=0, specials=ieee)", "float: with ieee specials and one exponent bit every value would be "
         "subnormal or Inf (character 1 of 'float(1, mantissa=0, specials=ieee)')"),
    ],
)  # fmt: skip
def test_an_error_points_at_the_character(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value) == message


def test_an_unknown_name_lists_what_exists_and_guesses() -> None:
    host = qsim.Host(discover=False)

    with pytest.raises(qsim.SpecError) as error:
        host.parse("chanel(int4)")

    assert str(error.value) == (
        "no component 'chanel'; did you mean 'channel'? There are: absmax, at_scale, auto, block, cast, channel, float32, fp32, minmax, "
        "scaled, tensor, token "
        "(character 1 of 'chanel(int4)')"
    )


def test_positions_count_characters_not_bytes() -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse('cast("ü", nope=1)')

    assert error.value.position == 15


def test_nothing_is_evaluated(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(qsim.SpecError, match="expected a component's name"):
        qsim.parse(f"__import__('os').mkdir('{tmp_path}/made')")

    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["(" * 300 + "int4" + ")" * 300, "-" * 3000 + "1", "abfp(" * 60 + ")" * 60])
def test_depth_is_bounded(text: str) -> None:
    with pytest.raises(qsim.SpecError):
        qsim.parse(text)


def test_nesting_may_go_to_the_bound_and_no_further() -> None:
    def nested(depth: int) -> str:
        return "scaled(int4, 4, " * depth + "bf16" + ")" * depth

    assert qsim.parse(nested(MAX_DEPTH)).name == "scaled"
    with pytest.raises(qsim.SpecError, match="nested deeper than 16"):
        qsim.parse(nested(MAX_DEPTH + 1))


def test_length_is_bounded() -> None:
    with pytest.raises(qsim.SpecError, match="has at most 16384 characters, not 16385"):
        qsim.parse("x" * (MAX_LENGTH + 1))


def test_a_component_is_frozen_hashable_and_keeps_its_text_when_copied() -> None:
    component = qsim.parse("abfp(int4, n=32)")

    assert {component: 1}[qsim.parse("abfp(int4, 32)")] == 1
    assert str(component.model_copy()) == "abfp(int4, n=32)"
    assert str(component.replace(n=16)) == "abfp(int4, n=16)"
    with pytest.raises(ValueError, match="frozen"):
        component.n = 3


def test_a_preset_that_is_changed_no_longer_prints_as_the_preset() -> None:
    assert str(qsim.parse("int4").replace(narrow=False)) == "int(4, narrow=false)"
