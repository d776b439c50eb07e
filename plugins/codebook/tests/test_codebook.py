"""Codebooks against the definition of nearest, and NF4 against its derivation."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import pytest
import torch

import qsim_core as qsim
from qsim_core.testing import QuantizerSuite


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the value nearest to each element of x, by comparing all distances in float64."""
    return values[(x.double()[:, None] - values.double()).abs().argmin(1)]


def test_the_nearest_value_is_chosen() -> None:
    values = torch.tensor([-3.0, -0.7, 0.1, 0.2, 5.0])
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3

    assert torch.equal(qsim.parse("codebook([-3, -0.7, 0.1, 0.2, 5])")(x), nearest(x, values))


def test_a_tie_goes_to_the_even_code() -> None:
    codebook = qsim.parse("codebook([0, 1, 2, 3])")

    assert codebook(torch.tensor([0.5, 1.5, 2.5])).tolist() == [0.0, 2.0, 2.0]
    assert codebook.replace(rounding="away")(torch.tensor([0.5, 1.5, 2.5])).tolist() == [1.0, 2.0, 3.0]
    assert codebook.replace(rounding="zero")(torch.tensor([0.9, 1.5, 9.0])).tolist() == [0.0, 1.0, 3.0]


@pytest.mark.parametrize("text", ["nf4", "codebook([-3, -0.5, 0, 0.75, 2])", "codebook([0, 1, 2, 3])"])
def test_every_half_precision_number_goes_to_the_nearest_value_and_every_tie_to_the_even_code(text: str) -> None:
    codebook = qsim.parse(text)
    values = torch.tensor(codebook.values)
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    turns = [torch.nextafter(middles, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = torch.cat([bits.view(torch.bfloat16).float(), bits.view(torch.float16).float(), values, middles, *turns])
    x = x[~x.isnan()]
    even_first = torch.cat([values[::2], values[1::2]])

    assert torch.equal(codebook(x), nearest(x.clamp(values[0], values[-1]), even_first))


def test_nf4s_values_are_quantiles_of_a_normal_distribution() -> None:
    """The values follow arXiv 2305.14314: quantiles of each half, scaled to [-1, 1], with the offset 0.9677083."""
    offset, normal = 0.9677083, NormalDist()
    below = [-normal.inv_cdf(0.5 + (offset - 0.5) * (7 - i) / 7) for i in range(7)]
    above = [normal.inv_cdf(0.5 + (offset - 0.5) * i / 8) for i in range(1, 9)]
    expected = torch.tensor([*below, 0.0, *above]) / normal.inv_cdf(offset)

    assert torch.allclose(torch.tensor(qsim.parse("nf4").values), expected, atol=2e-4)


def test_a_scheme_maps_the_largest_magnitude_to_the_largest_value() -> None:
    x = torch.tensor([[2.0, -1.0, 0.1, 0.0]])

    assert torch.equal(
        qsim.parse("block(codebook([-1, -0.5, 0, 0.5, 1]), 4)")(x), torch.tensor([[2.0, -1.0, 0.0, 0.0]])
    )


@pytest.mark.parametrize("text", ["-1, 0\n 0.5 # half\n1", "[-1, 0, 0.5, 1]"])
def test_a_file_is_read_once_and_its_values_are_the_text(text: str, tmp_path: Path) -> None:
    file = tmp_path / "levels.txt"
    file.write_text(text)

    codebook = qsim.parse(f'codebook(file="{file}")')
    file.unlink()

    assert str(codebook) == "codebook([-1.0, 0.0, 0.5, 1.0])"
    assert qsim.parse(str(codebook)) == codebook


def test_codes_are_places_in_ascending_order() -> None:
    codebook = qsim.parse("codebook([3, -1, 0])")

    assert codebook.encode(torch.tensor([-1.0, 0.0, 3.0, 9.0])).codes.tolist() == [0, 1, 2, 2]
    assert codebook.width == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("codebook", "codebook: values: give at least two values, as in codebook([-1, 0, 1]), or a file that holds them"),
        ("codebook([0, 1, 1])", "codebook: values: 1.0 and 1.0 are the same value in float32; remove one"),
        ("codebook([0, 1e999])", "a number is infinite (character 14 of 'codebook([0, 1e999])')"),
        ("codebook([0, 1e99])", "codebook: values: a value is beyond float32's range"),
        ('codebook([0, "x"])', "codebook: values.1 should be a valid number, unable to parse string as a number, not 'x'"),
        ("codebook(file=nowhere.txt)", ""),
        ('codebook(file="/dev/zero")', "codebook: cannot read /dev/zero: a codebook is a file of at most 16 MiB"),
        ('codebook(file="nowhere.txt")', "codebook: cannot read nowhere.txt: No such file or directory"),
        ('codebook([0, 1], file="nowhere.txt")', "codebook: give values or a file, not both"),
        ("codebook([1, 2, 3], rounding=up)", "codebook: rounding should be 'even', 'away', 'zero' or 'stochastic', not 'up'"),
        ("channel(codebook([1, 2, 3]))", "channel: codebook([1.0, 2.0, 3.0]) has no values at or below zero"),
        ("scaled(int4, 16, scale=nf4)", "scaled: nf4 as a scale needs a scale of its own, like scaled(nf4, channel)"),
    ],
)  # fmt: skip
def test_values_that_make_no_codebook_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(message)


def test_nan_in_a_file_is_refused_and_a_word_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "nan.txt").write_text("0 nan 1")
    (tmp_path / "word.txt").write_text("0 1\ntwo 3")

    with pytest.raises(qsim.SpecError, match="nan is not a finite number"):
        qsim.parse(f'codebook(file="{tmp_path}/nan.txt")')
    with pytest.raises(qsim.SpecError, match=r"word.txt, line 2: 'two' is not a number"):
        qsim.parse(f'codebook(file="{tmp_path}/word.txt")')


class TestCodebook(QuantizerSuite):
    text = ("nf4", "codebook([-3, -0.5, 0, 0.7, 2])")
