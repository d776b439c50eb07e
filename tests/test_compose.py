"""From options to a recipe, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qsim_core as qsim
from qsim_core.cli.recipe_options import compose, notes_of, with_setting


class Smooth(qsim.Transform):
    """A transform that has a name and changes nothing."""

    name = "smooth"
    alpha: float = 0.5

    def apply(self, model: torch.nn.Module, context: Any) -> None:
        model.register_buffer("alpha", torch.tensor(self.alpha))


class Signs(qsim.Quantizer):
    """The sign of each value."""

    name = "signs"

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        return x.sign()


@pytest.fixture
def host() -> qsim.Host:
    host = qsim.Host()
    host.register(Smooth, name="smooth")
    return host


def texts(host: qsim.Host, values: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return composed(host, values, **options).model_dump(mode="json", exclude_defaults=True)


def composed(
    host: qsim.Host, values: dict[str, Any] | None = None, settings: tuple[str, ...] = (), **options: Any
) -> qsim.Recipe:
    recipe = compose(host, values or {}, **options)
    for setting in settings:
        recipe = with_setting(host, recipe, setting)
    return recipe


def test_a_scheme_plugin_becomes_the_scheme_of_weights_and_activations(host: qsim.Host) -> None:
    assert texts(host, plugins=["abfp"]) == {
        "weights": "abfp(int4)",
        "activations": "abfp(int4)",
        "outputs": "cast(bf16)",
    }


def test_precision_changes_the_widths_of_the_scheme(host: qsim.Host) -> None:
    recipe = texts(host, plugins=["abfp"], precision="w4a8")

    assert (recipe["weights"], recipe["activations"]) == ("abfp(int4)", "abfp(int8)")


def test_precision_alone_takes_the_usual_schemes(host: qsim.Host) -> None:
    assert texts(host, precision="W3A8") == {"weights": "channel(int3)", "activations": "token(int8)"}
    assert texts(host, precision="w4a16") == {"weights": "channel(int4)", "activations": "cast(bf16)"}
    assert texts(host, precision="w4a32") == {"weights": "channel(int4)"}


def test_exact_texts_win_and_a_bare_format_takes_the_named_scheme(host: qsim.Host) -> None:
    recipe = texts(
        host,
        plugins=["abfp"],
        precision="w8a8",
        texts={"weights": "e2m1", "activations": "token(e4m3)", "outputs": "none"},
    )

    assert recipe == {"weights": "abfp(e2m1)", "activations": "token(e4m3)"}


def test_set_changes_an_option_wherever_the_component_stands(host: qsim.Host) -> None:
    recipe = texts(
        host,
        {"overrides": {"*.fc2": {"weights": "abfp(int8, n=32)"}}, "evaluate": "perplexity"},
        plugins=["abfp"],
        settings=["abfp.n=128", "perplexity.seqlen=64", "abfp.scale=none", "int.narrow=false"],
    )

    assert recipe == {
        "weights": "abfp(int(4, narrow=false), n=128, scale=none)",
        "activations": "abfp(int(4, narrow=false), n=128, scale=none)",
        "outputs": "cast(bf16)",
        "overrides": {"*.fc2": {"weights": "abfp(int(8, narrow=false), n=128, scale=none)"}},
        "evaluate": "perplexity(64)",
    } | {"overrides": recipe["overrides"]}
    assert recipe["overrides"]["*.fc2"]["weights"] == "abfp(int(8, narrow=false), n=128, scale=none)"


def test_a_quantizer_without_a_width_is_not_lost_under_a_precision(host: qsim.Host) -> None:
    host.register(Signs, name="signs")

    with pytest.raises(
        qsim.RecipeError,
        match=r"^--precision w4a8: signs has no width to change; leave --precision out, or say --weights and --activations$",
    ):
        compose(host, {}, plugins=["signs"], precision="w4a8")


def test_plugins_keep_their_order(host: qsim.Host) -> None:
    class Rotate(Smooth):
        """Another quantizer."""

        name = "rotate"

    host.register(Rotate, name="rotate")

    assert texts(host, plugins=["smooth", "abfp", "rotate"])["transforms"] == ["smooth(0.5)", "rotate(0.5)"]


def test_a_transform_is_found_in_a_plugin_of_another_name(host: qsim.Host) -> None:
    class Sharpen(Smooth):
        """Another transform of the same plugin."""

        name = "sharpen"

    host.register(Sharpen, name="tools")

    assert texts(host, plugins=["sharpen"], precision="w4a8")["transforms"] == ["sharpen(0.5)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugins": ["abpf"]}, "no plugin 'abpf' is installed; did you mean 'abfp'? There are "),
        ({"plugins": ["fp"]}, "plugin 'fp' (qsim-fp 0.1.0) has no quantizer, transform or evaluator called 'fp', so "
         "--plugin cannot say what to do with it; it offers: bf16, b"),
        ({"plugins": ["opt"]}, "'opt' is an adapter: it is found by itself for the models it knows, and needs no --plug"),
        ({"plugins": ["mxfp4"]}, "'mxfp4' is a quantizer: say --weights mxfp4, --activations mxfp4 or --outputs mxfp4"),
        ({"plugins": ["e4m3"]}, "'e4m3' is a format: say --weights e4m3, --activations e4m3 or --outputs e4m3"),
        ({"plugins": ["mse"]}, "'mse' is a calibrator: say --static mse"),
        ({"plugins": ["perplexity"]}, "'perplexity' is an evaluator: say --evaluator perplexity"),
        ({"plugins": ["abfp", "mx"]}, "--plugin abfp and --plugin mx both bring a quantizer of everything; name one of "
         "them, or say --weights and --activations"),
        ({"plugins": ["smooth"]}, "a transform alone quantizes nothing; say --weights or --precision with it"),
        ({"precision": "4x8"}, "--precision is written w4a8: the bits of weights and of activations, not '4x8'"),
        ({"precision": "w1a8"}, "--precision w1a8: weights may have 2 to 16 bits, or 32 for float32, not 1"),
        ({"settings": ["abfp.n"]}, "--set is written COMPONENT.OPTION=VALUE, like block.n=128, not 'abfp.n'"),
        ({"settings": ["mx.n=3"], "plugins": ["abfp"]}, "--set mx.n=3: the recipe has no component 'mx'"),
        ({"settings": ["abfp.m=3"], "plugins": ["abfp"]}, "abfp has no option 'm'. There are: element, gradient, n, range, rule, scale, static, symmetric"),
        ({"settings": ["abfp.n=0"], "plugins": ["abfp"]}, "--set abfp.n=0: n should be greater than 0, not 0"),
        ({"settings": ["abfp.element=int77"], "plugins": ["abfp"]}, "no format 'int77'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said_in_one_line(host: qsim.Host, options: dict[str, Any], message: str) -> None:
    with pytest.raises(qsim.QsimError) as error:
        composed(host, **options)

    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_two_presets_that_stand_for_one_width_are_an_error_that_names_both(host: qsim.Host) -> None:
    host.register(qsim.Preset("mine", "int(4, narrow=false)", stands_for_bits=4), name="acme")

    with pytest.raises(qsim.RecipeError, match=r"^int\.int4 and acme\.mine both stand for 4 bits; say --weights"):
        compose(host, {}, precision="w4a8")


def test_outputs_have_to_be_named_where_no_format_of_16_bits_is_installed() -> None:
    alone = qsim.Host(discover=False)
    alone.register(Signs, name="signs")

    with pytest.raises(qsim.RecipeError, match="^--plugin signs: no format of 16 bits is installed; say --outputs$"):
        compose(alone, {}, plugins=["signs"])

    assert texts(alone, plugins=["signs"], texts={"outputs": "none"}) == {"weights": "signs", "activations": "signs"}


def test_a_format_beside_a_scheme_plugin_says_what_it_means(host: qsim.Host) -> None:
    options = {"plugins": ("abfp",), "weights": "int4", "activations": "token(int8)", "outputs": None}
    recipe = compose(host, {}, ["abfp"], texts={"weights": "int4", "activations": "token(int8)"})

    assert notes_of(options, recipe, host) == [
        "--weights int4 beside --plugin means abfp(int4); say --weights 'channel(int4)' for that one"
    ]


def test_float32_is_no_quantizer(host: qsim.Host) -> None:
    assert compose(host, {"activations": "float32"}, texts={"weights": "int4", "outputs": "float32"}).outputs is None
