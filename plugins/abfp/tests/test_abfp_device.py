"""ABFP's analog device against exact fractions, by hand, and in every kind of product that a model has."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, w: Tensor, options: str, of_x: str = "int4", of_w: str = "int4") -> Tensor:
    """Of rows `[M, K]` and `[N, K]`, quantized and multiplied by the device."""
    left, right = qsim.parse(f"abfp({of_x}, {options})"), qsim.parse(f"abfp({of_w}, {options})")
    return left.multiplier(left(x), right(w), (left, right))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("gain", "expected"), [(1, 4 + 8), (4, 3.5 + 7), (2, 5 + 7)])
def test_a_product_by_hand(gain: int, expected: float) -> None:
    """Codes are [7, -2 | 7, 7] under scales 1 and 2/7, and [7, 7 | 7, -3] under 1/7 and 1; sums are 35 and 28 of 98.

    Four bits have 7 steps of 14. 35 is 2.5 steps and read as 2, 28 is 2 steps: 28 / 7 and 28 x 2/7. A gain of 4 makes 10
    and 8 of them, which are read as 7 of 3.5: 24.5 / 7 and 24.5 x 2/7. A gain of 2 makes 5 and 4 steps of 7: exact.
    """
    x, w = torch.tensor([[7.0, -2, 2, 2]]), torch.tensor([[1.0, 1, 7, -3]])

    found = product(x, w, f"n=2, scale=none, adc=4, gain={gain}")

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
    [(8, 8, 1, "int4", "int4"), (16, 6, 4, "int8", "int4"), (32, 8, 16, "int6", "int6"), (16, 8, 2, "e4m3", "e4m3")],
)
def test_it_is_what_fractions_give(n: int, adc: int, gain: int, of_x: str, of_w: str) -> None:
    x, w = noise(6, 75) * 3, noise(9, 75, seed=1)

    found = product(x, w, f"n={n}, adc={adc}, gain={gain}", of_x, of_w)

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

        assert product(x, w, "n=8, scale=none, adc=2")[0].item() == 0
        found = product(x, w, "n=8, scale=none, adc=2, noise=0.5") / 8
        assert found.unique().tolist() == pytest.approx([0, 1])
        assert float(found.mean()) == pytest.approx(0.25, abs=0.03)

    def test_it_depends_on_seed_and_tile(self) -> None:
        x = torch.ones(50, 16)
        first, again, other = (product(x, x, f"n=8, adc=6, noise=2, seed={seed}") for seed in (0, 0, 1))

        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        halves = product(x[:, :8], x[:, :8], "n=8, adc=6, noise=2, seed=0")
        assert not torch.equal(first, 2 * halves)

    def test_a_site_draws_anew_each_time_and_a_run_the_same(self) -> None:
        model, x = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8)), noise(4, 64)

        def outputs() -> list[Tensor]:
            text = "abfp(int8, n=8, adc=8, noise=1)"
            simulation = qsim.simulate(model, weights=text, activations=text, example=x)
            with torch.no_grad():
                found = [model(x), model(x)]
            simulation.restore()
            return found

        first, again = outputs(), outputs()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1])

    def test_a_tile_of_zeros_is_zero(self) -> None:
        assert product(torch.zeros(2, 8), noise(3, 8), "n=8, adc=8, noise=1").tolist() == [[0, 0, 0]] * 2


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


def simulated(model: nn.Module, example: Any, text: str, **options: Any) -> Tensor:
    simulation = qsim.simulate(model, weights=text, activations=text, example=example, **options)
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
        simulated(model, x, "abfp(int16, n=16, scale=none, adc=32)", **options), plain, rtol=5e-3, atol=5e-3
    )
    assert not torch.allclose(simulated(model, x, "abfp(int16, n=16, scale=none, adc=6)", **options), plain, rtol=0.01)


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

    found = simulated(layer, x, "abfp(int16, n=16, scale=none, adc=32)")

    assert torch.allclose(found, exact, rtol=1e-3, atol=1e-3)
    assert simulated(layer, x, "abfp(int8, n=16, adc=8)").shape == exact.shape


def test_patches_are_quantized_as_vectors_of_patches() -> None:
    layer, x = nn.Conv2d(2, 3, 2, bias=False), noise(1, 2, 5, 4)
    patches = F.unfold(x, 2).unflatten(1, (2, 4)).permute(0, 3, 2, 1).flatten(2)[0]  # inputs fastest
    rows = layer.weight.detach().permute(0, 2, 3, 1).flatten(1)

    found = simulated(layer, x, "abfp(int4, n=4, adc=6)")

    assert torch.allclose(found[0].flatten(1).T, product(patches, rows, "n=4, adc=6"), atol=1e-6)


def test_its_gradient_is_the_float_products() -> None:
    layer, x = nn.Linear(40, 8), noise(3, 40).requires_grad_()
    text = "abfp(int8, n=8, scale=none{})"
    gradients = []
    for device in ("", ", adc=8"):
        simulation = qsim.simulate(layer.train(), weights=text.format(device), activations=text.format(device))
        layer(x).sum().backward()
        gradients.append((x.grad, layer.weight.grad))
        x.grad = layer.weight.grad = None
        simulation.restore()

    for plain, through in zip(*gradients, strict=True):
        assert torch.equal(plain, through)


def test_the_audit_says_what_multiplied() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), noise(2, 8)
    text = "abfp(int4, n=8, adc=8, gain=4.0, noise=0.5)"

    audit = qsim.simulate(model, weights=text, activations=text, example=x).audit()

    assert audit.notes == [
        "0: multiplied by an analog device (tiles of 8, an ADC of 8 bits, gain 4, noise up to 0.5 of its steps)"
    ]
    assert str(qsim.parse(text)) == text


class Einsum(nn.Module):
    """A product that is no product of two matrices."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bij,bij->b", x, x)


DEVICE = "an analog device (tiles of 64, an ADC of 8 bits, gain 1)"


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (nn.Linear(4, 4), {"weights": "abfp(adc=8)"},
         f"weight: {DEVICE} multiplies two operands that are quantized for it, and here stand no quantizer and abfp(int4, adc=8)"),
        (nn.Linear(4, 4), {"weights": "abfp(adc=8)", "activations": "abfp(int8, adc=8, gain=2)"},
         "weight: an analog device (tiles of 64, an ADC of 8 bits, gain 2) multiplies two operands that are quantized for it, and "
         "here stand abfp(int8, adc=8, gain=2.0) and abfp(int4, adc=8)"),
        (Einsum(), {"activations": "abfp(adc=8)"},
         f":matmul.0: {DEVICE} multiplies matrices, and this is einsum; leave it alone with skip, or name other quantizers "
         "for it in overrides"),
    ],
)  # fmt: skip
def test_what_it_cannot_multiply(model: nn.Module, recipe: dict[str, str], message: str) -> None:
    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(model, **recipe, example=noise(2, 3, 4))
        model(noise(2, 3, 4))  # products of activations may get another name, and so other quantizers, until here

    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abfp(gain=2)", "gain, noise and seed are an analog device's; say how many bits its adc has, like adc=8"),
        ("abfp(adc=8, scale=e8m0)", "an analog device has scales max|x| / max(element) in bf16 or not rounded at all"),
        ("abfp(adc=8, rule=floor, scale=none)", "an analog device has scales max|x| / max(element) in bf16"),
        ("abfp(adc=8, symmetric=false)", "an analog device has scales max|x| / max(element) in bf16"),
        ("abfp(adc=1)", "adc"),
    ],
)
def test_options_that_make_no_device(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert message in str(error.value)
