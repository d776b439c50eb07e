"""Saturating sums against a loop over Python's integers."""

import numpy as np
import pytest
import torch
from qsim_saturating import Saturating

import qsim_core as qsim

LENGTH = 40


def rows(count: int, seed: int) -> torch.Tensor:
    """Rows [count, LENGTH] whose sums of products leave 16 bits and come back."""
    return torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(seed)).sign() * torch.linspace(
        9, 6, LENGTH
    )


def codes_and_scales(quantizer: qsim.Scheme, x: torch.Tensor) -> tuple[list[list[int]], np.ndarray]:
    """The integers that are stored, less their zero points, and the scale of each: [R, LENGTH]."""
    encoded = quantizer.encode(x)
    codes = quantizer.coded.from_codes(encoded.codes, torch.float64)
    if encoded.zero_points is not None:
        codes = codes - quantizer.coded.from_codes(encoded.zero_points, torch.float64)
    scales = encoded.scales.expand(len(x), -1)
    return codes.int().tolist(), scales.repeat_interleave(-(-LENGTH // scales.shape[-1]), -1)[:, :LENGTH].numpy()


def by_hand(left: list[list[int]], right: list[list[int]], s: np.ndarray, t: np.ndarray, block: int) -> np.ndarray:
    """One product after the other, block by block; scales are multiplied and added in float32."""
    found = np.zeros((len(left), len(right)), dtype=np.float32)
    for i, x in enumerate(left):
        for j, w in enumerate(right):
            for start in range(0, LENGTH, block):
                total = 0
                for a, b in zip(x[start : start + block], w[start : start + block], strict=True):
                    total = max(-32768, min(32767, total + a * b))
                found[i, j] += np.float32(total) * s[i, start] * t[j, start]
    return found


@pytest.mark.parametrize(
    ("activations", "weights", "block"),
    [
        ("token(int8)", "channel(int8)", LENGTH),
        ("tensor(int8)", "tensor(int6)", LENGTH),
        ("token(uint8, symmetric=false)", "channel(int8)", LENGTH),
        ("token(int16)", "channel(int4)", LENGTH),
        ("token(int8)", "block(int8, 16)", 16),
        ("block(int8, 8)", "block(int8, 16)", 8),
    ],
)
def test_sums_are_those_of_python_integers(activations: str, weights: str, block: int) -> None:
    operands = [(qsim.parse(activations), rows(5, 0)), (qsim.parse(weights), rows(7, 1))]
    (x, s), (w, t) = (codes_and_scales(*operand) for operand in operands)

    y = Saturating().multiply(*(qsim.QuantizedRows.of(*operand) for operand in operands))

    assert np.array_equal(y.numpy(), by_hand(x, w, s, t, block))


def test_sums_saturate() -> None:
    codes = qsim.parse("cast(int8)")
    x, w = torch.tensor([[127.0, 127, 127, -127]]), torch.full((1, 4), 127.0)

    y = Saturating().multiply(qsim.QuantizedRows.of(codes, x), qsim.QuantizedRows.of(codes, w))

    assert y.item() == 2**15 - 1 - 127 * 127


def test_other_formats_are_an_error_that_names_the_site() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))

    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(model, weights="int8", activations="e4m3", arithmetic=Saturating(), example=torch.ones(1, 4))

    assert str(error.value) == (
        "0: saturating cannot multiply token(e4m3) and channel(int8): it takes integers on both operands"
    )
