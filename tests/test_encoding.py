"""Codes, scales and zero points give the quantized tensor bit for bit, in as many bits as `bits_per_element` says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.codes import pack, unpack

QUANTIZERS = [
    "int4",
    "uint3",
    "int16",
    "e4m3",
    "e5m2",
    "bf16",
    "e3m0",
    "binary8p3",
    "cast(e2m1)",
    "nf4",
    "posit(8)",
    "log2(4)",
    "tensor(int4)",
    "channel(int4)",
    "channel(int(4, narrow=false, convention=gptq))",
    "channel(int4, symmetric=false)",
    "channel(uint3, symmetric=false, scale=bf16)",
    "token(e4m3)",
    "block(int4, 16)",
    "block(nf4, 64)",
    "block(e4m3, [3, 8])",
    "block(uint4, [2, 5], symmetric=false)",
    "abfp(int4, n=64)",
    "abfp(e2m1, n=7, scale=e4m3)",
    "abfp(int4, scale=scaled(int8, channel))",
    "abfp(int4, scale=e8m0)",
    "mxfp8_e4m3",
    "mxfp4",
    "mxint8",
    "nvfp4",
    "msfp12",
    "deepseek_weights",
    "channel(int4, range=mse)",
    "channel(int4, range=percentile(90), symmetric=false)",
    "abfp(int4(rounding=stochastic))",
]


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator) * torch.exp2(
        torch.randint(-9, 9, shape, generator=generator).float()
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell if two tensors are equal: with the same sign of zero, and NaN in the same places."""
    known = ~a.isnan()
    return (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a[known], b[known])
        and torch.equal(a[known].signbit(), b[known].signbit())
    )


@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decoding_gives_the_quantized_tensor(text: str, dtype: torch.dtype) -> None:
    quantizer, x = qsim.parse(text), noise(3, 5, 35).to(dtype)
    x[0, 0] = 0

    encoded = quantizer.encode(x)

    assert same_bits(quantizer.decode(encoded), quantizer.quantize(x))
    assert encoded.codes.shape == x.shape
    assert int(encoded.codes.max()) < 2**encoded.width


@pytest.mark.parametrize(
    "text", [text for text in QUANTIZERS if "(" in text and not text.startswith(("cast", "posit", "log2"))]
)
def test_a_block_with_nan_decodes_to_nan(text: str) -> None:
    quantizer, x = qsim.parse(text), noise(4, 40)
    x[1, 3] = torch.nan

    assert same_bits(quantizer.decode(quantizer.encode(x)), quantizer.quantize(x))


@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize("shape", [(8, 128), (5, 33), (2, 3, 7), (9,), (1, 1)])
def test_the_bits_stored_are_the_bits_said(text: str, shape: tuple[int, ...]) -> None:
    if "[" in text and len(shape) == 1:
        return
    if "deepseek_weights" in text and len(shape) == 1:
        return
    quantizer, x = qsim.parse(text), noise(*shape)

    encoded = quantizer.encode(x)

    assert encoded.bits / x.numel() == pytest.approx(quantizer.bits_per_element(x.shape), rel=1e-12)
    assert encoded.packed().numel() == (x.numel() * encoded.width + 7) // 8


def test_a_scale_that_nothing_rounds_counts_as_float32_whatever_the_tensor_is() -> None:
    x, quantizer = noise(4, 16).double(), qsim.parse("block(int4, 8)")

    assert quantizer.encode(x).bits / x.numel() == quantizer.bits_per_element(x.shape) == 4 + 32 / 8


@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize("shape", [(3, 0), (0, 4)])
def test_an_empty_tensor_has_codes_too(text: str, shape: tuple[int, ...]) -> None:
    quantizer, x = qsim.parse(text), torch.empty(shape, dtype=torch.bfloat16)

    encoded = quantizer.encode(x)

    assert (encoded.codes.shape, encoded.bits) == (shape, 0)
    assert (quantizer.decode(encoded).shape, quantizer.decode(encoded).dtype) == (shape, torch.bfloat16)


def test_codes_without_scales_are_no_schemes() -> None:
    encoded = qsim.parse("int4").encode(torch.ones(4))

    with pytest.raises(qsim.QsimError, match=r"^these codes have no scales that tensor\(int4\) could decode$"):
        qsim.parse("tensor(int4)").decode(encoded)


@pytest.mark.parametrize("width", range(1, 17))
def test_packed_codes_unpack(width: int) -> None:
    codes = torch.randint(0, 2**width, (3, 37), generator=torch.Generator().manual_seed(width))

    packed = pack(codes, width)

    assert packed.numel() == (3 * 37 * width + 7) // 8
    assert torch.equal(unpack(packed, width, (3, 37)).long(), codes)


def test_four_bit_codes_fill_a_byte_from_its_low_nibble() -> None:
    assert pack(torch.tensor([0x1, 0x2, 0x3]), 4).tolist() == [0x21, 0x03]


def test_three_bit_codes_cross_bytes() -> None:
    assert pack(torch.tensor([0b001, 0b010, 0b111]), 3).tolist() == [0b11_010_001, 0b1]


def test_too_few_bytes_are_an_error() -> None:
    with pytest.raises(qsim.QsimError, match="^5 codes of 3 bits fill 2 bytes, not 1$"):
        unpack(torch.tensor([1], dtype=torch.uint8), 3, (5,))


def test_a_callable_has_no_codes() -> None:
    quantizer = qsim.Recipe(weights=torch.trunc).weights  # type: ignore[arg-type]

    with pytest.raises(qsim.QsimError, match=r"^function\(trunc\) has no codes"):
        quantizer.encode(torch.ones(2))  # type: ignore[union-attr]


def test_the_scales_of_scales_are_codes_too() -> None:
    encoded = qsim.parse("abfp(int4, scale=scaled(int8, channel))").encode(noise(4, 256))

    assert isinstance(encoded.scales, qsim.Encoded)
    assert (encoded.scales.codes.shape, encoded.scales.width) == ((4, 4), 8)
    assert isinstance(encoded.scales.scales, Tensor)
    assert encoded.scales.scales.shape == (4, 1)
