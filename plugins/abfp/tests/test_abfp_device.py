"""ABFP's analog device against exact fractions, by hand, and in every kind of product that a model has."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.testing import ArithmeticSuite


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, w: Tensor, device: str, of_x: str = "int4", of_w: str = "int4", scheme: str = "n=64") -> Tensor:
    """Of rows `[M, K]` and `[N, K]`, quantized and multiplied by the device."""
    left, right = (
        qsim.QuantizedRows.of(qsim.parse(f"abfp({element}, {scheme})"), rows)
        for element, rows in ((of_x, x), (of_w, w))
    )
    return qsim.parse(f"analog({device})").multiply(left, right)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("gain", "expected"), [(1, 4 + 8), (4, 3.5 + 7), (2, 5 + 7)])
def test_a_product_by_hand(gain: int, expected: float) -> None:
    """Codes are [7, -2 | 7, 7] under scales 1 and 2/7, and [7, 7 | 7, -3] under 1/7 and 1; sums are 35 and 28 of 98.

    Four bits have 7 steps of 14. 35 is 2.5 steps and read as 2, 28 is 2 steps: 28 / 7 and 28 x 2/7. A gain of 4 makes 10
    and 8 of them, which are read as 7 of 3.5: 24.5 / 7 and 24.5 x 2/7. A gain of 2 makes 5 and 4 steps of 7: exact.
    """
    x, w = torch.tensor([[7.0, -2, 2, 2]]), torch.tensor([[1.0, 1, 7, -3]])

    found = product(x, w, f"adc=4, gain={gain}", scheme="n=2, scale=none")

    assert found.item() == pytest.approx(13 if gain == 2 else expected, rel=1e-6)


def by_the_book(x: Tensor, w: Tensor, n: int, adc: int, gain: int, of_x: str, of_w: str) -> Tensor:
    """Tile by tile, from the codes that are stored, in fractions."""
    left, right = qsim.parse(f"abfp({of_x}, n={n})"), qsim.parse(f"abfp({of_w}, n={n})")
    stored = []
    for operand, quantizer in ((x, left), (w, right)):
        encoded = quantizer.encode(operand)
        codes = quantizer.element.from_codes(encoded.codes, torch.float64).tolist()
        stored.append((codes, quantizer.scale.decode(encoded.scales).tolist()))
    (x_codes, x_scales), (w_codes, w_scales) = stored
    levels = 2 ** (adc - 1) - 1
    step = Fraction(n) * Fraction(left.element.max) * Fraction(right.element.max) / levels
    found = torch.zeros(len(x), len(w), dtype=torch.float64)
    for row, (a, a_scales) in enumerate(zip(x_codes, x_scales, strict=True)):
        for column, (b, b_scales) in enumerate(zip(w_codes, w_scales, strict=True)):
            for tile, (of_a, of_b) in enumerate(zip(a_scales, b_scales, strict=True)):
                part = slice(tile * n, (tile + 1) * n)
                total = sum(Fraction(p) * Fraction(q) for p, q in zip(a[part], b[part], strict=True))
                read = min(max(round(gain * total / step), -levels), levels)
                found[row, column] += float(read * step / gain) * of_a * of_b
    return found


@pytest.mark.parametrize(
    ("n", "adc", "gain", "of_x", "of_w"),
    [
        (8, 8, 1, "int4", "int4"),
        (16, 6, 4, "int8", "int4"),
        (32, 8, 16, "int6", "int6"),
        (16, 8, 2, "e4m3", "e4m3"),
        (16, 10, 1, "int12", "int12"),
        (8, 9, 2, "int16", "int10"),
    ],
)
def test_it_is_what_fractions_give(n: int, adc: int, gain: int, of_x: str, of_w: str) -> None:
    x, w = noise(6, 75) * 3, noise(9, 75, seed=1)

    found = product(x, w, f"adc={adc}, gain={gain}", of_x, of_w, f"n={n}")

    expected = by_the_book(x, w, n, adc, gain, of_x, of_w)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(found, qsim.parse(f"abfp({of_x}, n={n})")(x) @ qsim.parse(f"abfp({of_w}, n={n})")(w).T)


def test_with_many_bits_it_is_abfp() -> None:
    x, w = noise(6, 200), noise(9, 200, seed=1)
    abfp = qsim.parse("abfp(int4)")

    assert torch.allclose(product(x, w, "adc=32"), abfp(x) @ abfp(w).T, rtol=1e-5, atol=2e-6)


def test_gain_helps_until_sums_saturate() -> None:
    """The finding that the device has an amplifier for (arXiv 2205.06287, abstract)."""
    x, w = noise(40, 512), noise(40, 512, seed=1)
    abfp = qsim.parse("abfp(int8)")
    exact = abfp(x) @ abfp(w).T

    errors = [float((product(x, w, f"adc=8, gain={g}", "int8", "int8") - exact).norm()) for g in (1, 4, 8, 64)]

    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[3] > errors[0]


class TestNoise:
    """Noise is drawn by its seed, its site, its step and its place, and is what it says."""

    def test_uniform_noise_of_half_a_step_dithers(self) -> None:
        """Of sums that are 0.25 of a step half a step of noise makes 0.25 on average, in 4,000 draws."""
        x, w = torch.ones(4000, 8), torch.tensor([[1.0] * 5 + [-1.0] * 3])

        assert product(x, w, "adc=2", scheme="n=8, scale=none")[0].item() == 0
        found = product(x, w, "adc=2, noise=0.5", scheme="n=8, scale=none") / 8
        assert found.unique().tolist() == pytest.approx([0, 1])
        assert float(found.mean()) == pytest.approx(0.25, abs=0.03)

    def test_it_depends_on_seed_and_tile(self) -> None:
        x = torch.ones(50, 16)
        first, again, other = (product(x, x, f"adc=6, noise=2, seed={seed}", scheme="n=8") for seed in (0, 0, 1))

        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        halves = product(x[:, :8], x[:, :8], "adc=6, noise=2", scheme="n=8")
        assert not torch.equal(first, 2 * halves)

    def test_a_site_draws_anew_each_time_and_a_run_the_same(self) -> None:
        model, x = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8)), noise(4, 64)

        def outputs() -> list[Tensor]:
            text, device = "abfp(int8, n=8)", "analog(adc=8, noise=1)"
            simulation = qsim.simulate(model, weights=text, activations=text, arithmetic=device, example=x)
            with torch.no_grad():
                found = [model(x), model(x)]
            simulation.restore()
            return found

        first, again = outputs(), outputs()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1])

    def test_a_tile_of_zeros_is_zero(self) -> None:
        assert product(torch.zeros(2, 8), noise(3, 8), "adc=8, noise=1", scheme="n=8").tolist() == [[0, 0, 0]] * 2


class Products(nn.Module):
    """Every product that is not a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.weight = nn.Linear(40, 24), nn.Parameter(noise(24, 16))
        self.bias = nn.Parameter(noise(16, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = torch.addmm(self.bias, y.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])
        scores = torch.baddbmm(y.mean((1, 2), keepdim=True), y, y.transpose(1, 2), beta=2.0, alpha=0.5)
        attended = scores.softmax(-1) @ y
        return torch.bmm(attended, y.transpose(1, 2)) + (attended @ y[0, 0]).unsqueeze(-1)


def simulated(model: nn.Module, example: Any, text: str, device: str = "auto", **options: Any) -> Tensor:
    simulation = qsim.simulate(model, weights=text, activations=text, arithmetic=device, example=example, **options)
    try:
        with torch.no_grad():
            return model(example)  # type: ignore[no-any-return]
    finally:
        simulation.restore()


@pytest.mark.parametrize("outputs", [None, "tf32"])
def test_every_product_of_matrices_goes_through_it(outputs: str | None) -> None:
    model, x = Products(), noise(3, 5, 40)
    options = {} if outputs is None else {"outputs": outputs}

    plain = simulated(model, x, "abfp(int16, n=16, scale=none)", **options)

    assert torch.allclose(
        simulated(model, x, "abfp(int16, n=16, scale=none)", "analog(adc=32)", **options), plain, rtol=5e-3, atol=5e-3
    )
    assert not torch.allclose(
        simulated(model, x, "abfp(int16, n=16, scale=none)", "analog(adc=6)", **options), plain, rtol=0.01
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7)),
        (nn.Conv2d(6, 8, (3, 2), dilation=(2, 1), groups=2, bias=False), (2, 6, 9, 7)),
        (nn.Conv2d(3, 8, (5, 3), padding="same", dilation=(1, 2)), (3, 9, 7)),
        (nn.Conv1d(6, 9, 5, stride=3, padding=2, groups=3), (2, 6, 20)),
    ],
)
def test_a_convolution_is_a_product_of_patches(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    with torch.no_grad():
        exact = layer(x)

    found = simulated(layer, x, "abfp(int16, n=16, scale=none)", "analog(adc=32)")

    assert torch.allclose(found, exact, rtol=1e-3, atol=1e-3)
    assert simulated(layer, x, "abfp(int8, n=16)", "analog(adc=8)").shape == exact.shape


def test_patches_are_quantized_as_vectors_of_patches() -> None:
    layer, x = nn.Conv2d(2, 3, 2, bias=False), noise(1, 2, 5, 4)
    patches = F.unfold(x, 2).unflatten(1, (2, 4)).permute(0, 3, 2, 1).flatten(2)[0]  # inputs fastest
    rows = layer.weight.detach().permute(0, 2, 3, 1).flatten(1)

    found = simulated(layer, x, "abfp(int4, n=4)", "analog(adc=6)")

    assert torch.allclose(found[0].flatten(1).T, product(patches, rows, "adc=6", scheme="n=4"), atol=1e-6)


def test_its_gradient_is_the_float_products() -> None:
    layer, x = nn.Linear(40, 8), noise(3, 40).requires_grad_()
    text = "abfp(int8, n=8, scale=none)"
    gradients = []
    for device in ("float32", "analog(adc=8)"):
        simulation = qsim.simulate(layer.train(), weights=text, activations=text, arithmetic=device)
        layer(x).sum().backward()
        gradients.append((x.grad, layer.weight.grad))
        x.grad = layer.weight.grad = None
        simulation.restore()

    for plain, through in zip(*gradients, strict=True):
        assert torch.equal(plain, through)


def test_the_audit_says_what_multiplied() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), noise(2, 8)
    device = "analog(8, gain=4.0, noise=0.5)"

    simulation = qsim.simulate(model, weights="abfp(int4)", activations="abfp(int8)", arithmetic=device, example=x)

    assert [site.arithmetic for site in simulation.audit().sites] == [device]
    assert str(simulation.recipe.arithmetic) == device


class Attention(nn.Module):
    """Products of activations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (nn.Linear(4, 4), {"weights": "abfp"},
         "weight: analog(8) cannot multiply no quantizer and abfp(int4): it takes abfp on both operands"),
        (nn.Linear(4, 4), {"weights": "abfp", "activations": "int8"},
         "weight: analog(8) cannot multiply token(int8) and abfp(int4): it takes abfp on both operands"),
        (nn.Linear(4, 4), {"weights": "abfp", "activations": "abfp(int8, n=32)"},
         "weight: analog(8) cannot multiply abfp(int8, n=32) and abfp(int4): it takes vectors of one length n"),
        (nn.Linear(4, 4), {"weights": "abfp(scale=e8m0)", "activations": "abfp"},
         "weight: analog(8) cannot multiply abfp(int4) and abfp(int4, scale=e8m0): it takes scales in bf16, or not rounded "
         "at all"),
        (nn.Linear(4, 4), {"weights": "abfp(symmetric=false)", "activations": "abfp"},
         "weight: analog(8) cannot multiply abfp(int4) and abfp(int4, symmetric=false): it takes scales max|x| / "
         "max(element), found anew for each tensor"),
        (nn.Linear(4, 4), {"weights": "abfp(rule=floor, scale=none)", "activations": "abfp"},
         "weight: analog(8) cannot multiply abfp(int4) and abfp(int4, scale=none, rule=floor): it takes scales max|x| / "
         "max(element), found anew for each tensor"),
        (Attention(), {"activations": "abfp", "values": "int8"},
         ":matmul.1: analog(8) cannot multiply abfp(int4) and token(int8): it takes abfp on both operands"),
    ],
)  # fmt: skip
def test_what_it_cannot_multiply(model: nn.Module, recipe: dict[str, str], message: str) -> None:
    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(model, recipe | {"arithmetic": "analog(adc=8)"}, example=noise(2, 3, 4))
        model(noise(2, 3, 4))  # products of activations may get another name, and so other quantizers, until here

    assert str(error.value) == message


@pytest.mark.parametrize("text", ["abfp(int4, adc=8)", "abfp(int4, gain=2)", "abfp(noise=0.5)", "abfp(seed=1)"])
def test_options_of_the_device_say_where_they_went(text: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    option = text.removesuffix(")").replace("(", " ").replace(",", "").split()[-1].partition("=")[0]
    assert str(error.value).startswith(
        f"abfp has no option {option!r} any more; the analog device is an arithmetic of its own: beside abfp say "
        f"arithmetic: analog(adc=8, gain=4, noise=0.5) (character "
    )


def test_in_python_and_by_set_they_say_so_too() -> None:
    with pytest.raises(
        ValueError, match="abfp has no option 'adc' any more; the analog device is an arithmetic of its"
    ):
        qsim.parse("abfp(int4)").replace(adc=8)
    command = ["evaluate", "opt-tiny", "--plugin", "abfp", "--set", "abfp.adc=8", "--dry-run"]

    outcome = CliRunner().invoke(main, command)

    assert outcome.exit_code == 1
    assert "Error: abfp has no option 'adc' any more; the analog device is an arithmetic of its own" in outcome.output


@pytest.mark.parametrize("text", ["analog(adc=1)", "analog(gain=0)", "analog(noise=-1)"])
def test_options_that_make_no_device(text: str) -> None:
    with pytest.raises(qsim.SpecError, match=r"^analog: (adc|gain|noise)"):
        qsim.parse(text)


def test_one_command_evaluates_it() -> None:
    device = "analog(adc=8, gain=8, noise=0.5)"
    command = ["evaluate", "opt-tiny", "--plugin", "abfp", "--precision", "w4a8", "--arithmetic", device]

    outcome = CliRunner().invoke(main, [*command, "--limit", "1", "--json", "-"])

    assert outcome.exit_code == 0, outcome.output
    result = qsim.Result.model_validate_json(outcome.stdout)
    assert result.simulated["perplexity"] > result.baseline["perplexity"]
    assert result.recipe["activations"] == "abfp(int8)"
    assert result.recipe["arithmetic"] == "analog(8, gain=8.0, noise=0.5)"


class TestAnalog(ArithmeticSuite):
    text = ("analog", "analog(adc=6, gain=2, noise=0.5)")
    weights = "abfp(int4, n=16)"
    activations = "abfp(int8, n=16)"
