"""Block formats against torchao, and against gfloat block by block."""

from __future__ import annotations

import math
import warnings
from typing import Any

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.testing import CalibratorSuite, QuantizerSuite

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

ELEMENTS = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": torch.float4_e2m1fn_x2,
}


def spread(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return rows of normal values, each row scaled by one of 60 powers of two, with some powers of two and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-30, 30, (rows, 1), generator=generator).float())
    x[::7, ::5] = torch.exp2(torch.randint(-30, 30, x[::7, ::5].shape, generator=generator).float())
    x[::11, ::3] = 0
    return x


def by_torchao(name: str, x: Tensor, mode: Any) -> Tensor:
    return MXTensor.to_mx(x, ELEMENTS[name], 32, mode).dequantize(torch.float32)


def rule(name: str, text: str) -> Any:
    return qsim.parse(name).replace(rule=text)


@pytest.mark.parametrize("mode", ["floor", "ceil", "even"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_torchaos(name: str, mode: str) -> None:
    x = spread(400, 256)

    assert torch.equal(rule(name, mode)(x), by_torchao(name, x, ScaleCalculationMode(mode)))


@pytest.mark.parametrize("name", ELEMENTS)
def test_rceil_is_torchaos_except_next_to_powers_of_two(name: str) -> None:
    """Torchao takes a float32 log2, which may be wrong next to powers of two; those blocks are left out."""
    x = spread(400, 256)
    y, expected = rule(name, "rceil")(x), by_torchao(name, x, ScaleCalculationMode.RCEIL)
    quotient = x.unflatten(-1, (-1, 32)).abs().amax(-1).double() / rule(name, "rceil").element.max
    exponent = quotient.log2()
    clear = ((exponent - exponent.round()).abs() > 1e-5) | (quotient == 0)

    same = (y == expected).unflatten(-1, (-1, 32)).all(-1)

    assert same[clear].all()
    assert clear.float().mean() > 0.9


@pytest.mark.parametrize("name", [*ELEMENTS, "mxint8"])
def test_mx_is_gfloats_block_by_block(name: str) -> None:
    info = {"mxfp4": "mxfp4_e2m1"}.get(name, name)
    x = spread(20, 128)

    y = qsim.parse(name)(x)

    blocks = x.double().numpy().reshape(-1, 32)
    description = getattr(gfloat.formats, f"format_info_{info}")
    scales = [gfloat.compute_scale_amax(0.0 if name == "mxint8" else description.etype.emax, block) for block in blocks]
    expected = [
        gfloat.quantize_block(description, block, lambda emax, values, scale=scale: scale)
        for block, scale in zip(blocks, scales, strict=True)
    ]
    assert torch.equal(y.double(), torch.from_numpy(np.stack(expected)).reshape(x.shape))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4"])
def test_codes_and_scales_are_torchaos(name: str) -> None:
    x = spread(40, 128)

    encoded = qsim.parse(name).encode(x)

    theirs = MXTensor.to_mx(x, ELEMENTS[name], 32, ScaleCalculationMode.FLOOR)
    assert isinstance(encoded.scales, qsim.Encoded)
    assert torch.equal(encoded.scales.codes, theirs.scale.view(torch.uint8))
    data = theirs.qdata.view(torch.uint8).flatten()
    assert torch.equal(encoded.packed(), data)


def test_the_scale_of_ocp_by_hand() -> None:
    """By OCP MX v1.0, 6.3, the scale is 2^(2 - 2): floor(log2 7.5) = 2 = emax(E2M1). 7.5 saturates, 0.26 becomes 0.5."""
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([7.5, 0.26, -5.0])

    assert qsim.parse("mxfp4")(x)[0, :3].tolist() == [6.0, 0.5, -4.0]
    assert qsim.parse("mx(e2m1, rule=rceil)")(x)[0, :3].tolist() == [8.0, 0.0, -4.0]


def test_a_block_of_zeros_stays_zero_and_a_block_with_inf_becomes_nan() -> None:
    x = torch.ones(2, 64)
    x[0, :32] = 0
    x[1, 3] = torch.inf

    y = qsim.parse("mxfp4")(x)

    assert torch.equal(y[0, :32], torch.zeros(32))
    assert y[1, :32].isnan().all()
    assert torch.equal(y[1, 32:], torch.ones(32))


def test_the_smallest_scale_is_e8m0s() -> None:
    x = torch.full((1, 32), 2.0**-130)

    assert torch.equal(qsim.parse("mxfp8_e4m3")(x), x)
    assert qsim.parse("mxfp8_e4m3").encode(x).scales.codes.item() == 0  # type: ignore[union-attr]


def nvfp4_by_hand(x: Tensor) -> Tensor:
    """Round by two levels of scales: block scales max/6 in E4M3, in units of the largest block scale over 448."""
    blocks = x.unflatten(-1, (-1, 16))
    exact = blocks.abs().amax(-1) / 6
    unit = exact.max() / 448
    scale = ((exact / unit).clamp(max=448).to(torch.float8_e4m3fn).float() * unit).unsqueeze(-1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    units = blocks / torch.where(scale == 0, 1, scale)
    distance = (units.abs().clamp(max=6).unsqueeze(-1).double() - values.double()).abs()
    even = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # even codes first: argmin takes the first of equals
    chosen = values[even[distance[..., even].argmin(-1)]]
    return (torch.copysign(chosen, units) * scale).flatten(-2)


def test_nvfp4_is_its_definition() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64).unsqueeze(-1)

    assert torch.equal(qsim.parse("nvfp4")(x), nvfp4_by_hand(x))


def test_nvfp4s_scales_are_torchaos_except_for_the_smallest() -> None:
    """Torchao keeps block scales at E4M3's smallest normal value or above. Its scale of the tensor differs in the last bit."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    scales, packed = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))

    encoded = qsim.parse("nvfp4").encode(x)

    assert (encoded.scales.codes == scales.view(torch.uint8)).float().mean() > 0.99  # type: ignore[union-attr]
    assert (encoded.packed() == packed.view(torch.uint8).flatten()).float().mean() > 0.99


def four_over_six_by_hand(x: Tensor) -> Tensor:
    """Try both scales of each block, one block at a time: the scale of the tensor is max/1536."""
    unit, result = x.abs().max() / 6 / 256, x.clone().view(-1, 16)
    for block in result:
        tried = []
        for factor in (1, 1.5):
            scale = (block.abs().max() * factor / 6 / unit).to(torch.float8_e4m3fn).float() * unit
            tried.append(qsim.parse("e2m1")(block / scale) * scale)
        six, four = (float((y - block).square().sum()) for y in tried)
        block.copy_(tried[four < six])
    return result.view(x.shape)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_four_over_six_takes_the_better_of_two_scales(spread: float) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-spread, spread, 32)[:, None]

    assert torch.equal(qsim.parse("nvfp4_adaptive")(x), four_over_six_by_hand(x))


def test_four_over_six_by_hand() -> None:
    """The scale of the tensor is 1536 / 1536 = 1. In the second block 40 / 6 would be the scale 6.5; 40 / 4 is exact."""
    x = torch.zeros(1, 48)
    x[0, 0] = 1536
    x[0, 16:20] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    x[0, 32:35] = torch.tensor([36.0, -18.0, 3.0])
    encoded = qsim.parse("nvfp4_adaptive").encode(x)

    assert torch.equal(qsim.parse("nvfp4_adaptive")(x), x)
    assert qsim.parse("nvfp4(scale=at_scale(e4m3, 1))")(x)[0, 16:20].tolist() == [9.75, 19.5, 26.0, 39.0]
    assert qsim.parse("scaled(e4m3(full_scale=256))").decode(encoded.scales).tolist() == [[256.0, 10.0, 6.0]]  # type: ignore[arg-type]


def test_four_over_six_has_a_smaller_error_than_nvfp4() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain, adaptive = (float((qsim.parse(text)(x) - x).square().mean()) for text in ("nvfp4", "nvfp4_adaptive"))

    assert adaptive < 0.93 * plain


@pytest.mark.parametrize(("name", "bits"), [("mx4", 3), ("mx6", 5), ("mx9", 8)])
def test_microexponents_are_their_definition(name: str, bits: int) -> None:
    """The exponent of 16 values is that of the largest; a pair without a value in that binade has one less."""
    x = spread(20, 64)
    expected = x.clone()
    for block in expected.view(-1, 16):
        largest = math.frexp(float(block.abs().max()))[1] - 1
        for pair in block.view(8, 2):
            shift = int(float(pair.abs().max()) < 2.0**largest)
            step = 2.0 ** (largest - shift - (bits - 2))
            pair.copy_((pair / step).round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) * step)

    y = qsim.parse(name)(x)

    assert torch.equal(y, torch.where(x == 0, x, expected))


def test_a_microexponent_by_hand() -> None:
    """Half the largest of 8 scales, 4, is the base; scales from 8/7 of it on become twice the base."""
    x = torch.tensor([[8.0, 1.0, 4.0, 5.0, 0.0, 0.25, 7.0, 2.0, 6.0]])

    assert qsim.parse("microexponent(8)")(x).tolist() == [[8.0, 4.0, 4.0, 8.0, 4.0, 4.0, 8.0, 4.0, 4.0]]
    encoded = qsim.parse("microexponent(8)").encode(x)
    assert encoded.codes.tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 1]]
    assert encoded.bits == 9 + 2 * 8


def test_a_search_of_ranges_keeps_the_bases_of_the_whole_range() -> None:
    """Each candidate of a block is tried under the base that is used: the error is never larger than without a search."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))

    errors = {text: qsim.parse(text)(x) - x for text in ("hif4", "hif4(range=mse(norm=2))")}

    plain, searched = (error.unflatten(-1, (-1, 4)).square().sum(-1) for error in errors.values())
    assert (searched <= plain).all()
    assert searched.sum() < plain.sum()


def hif4_by_hand(x: Tensor) -> Tensor:
    """Round each 64 values by E6M2 of max/7, a factor of 2 for 8 and another for 4 of them, and quarters below 2."""
    result = x.clone()
    for block in result.view(-1, 64):
        base = float(qsim.parse("e6m2")(block.abs().max() / 7))
        for eight in block.view(8, 8):
            second = 2 if float(eight.abs().max()) >= 4 * base else 1
            for four in eight.view(2, 4):
                third = 2 if float(four.abs().max()) >= 2 * second * base else 1
                scale = base * second * third
                magnitude = ((four.abs() / scale * 4 + 0.5).floor() / 4).clamp(max=1.75)
                four.copy_(four.sign() * magnitude * scale)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hif4_is_its_definition(dtype: torch.dtype) -> None:
    x = (torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 32)[:, None]).to(
        dtype
    )

    assert torch.equal(qsim.parse("hif4")(x), hif4_by_hand(x.float()).to(dtype))


def test_hif4_by_hand() -> None:
    """The scale of 64 is 7/7. Those of the four groups are 4, 2, 2 and 1; 3.9 saturates at 1.75 times 2."""
    x = torch.zeros(1, 64)
    x[0, :16] = torch.tensor([7.0, -4, 1.3, 0.1, 1.9, 0.6, 0.3, 0, 3.9, 1, 0, 0, 0.4, 0, 0, 0])

    y = qsim.parse("hif4")(x)[0, :16].tolist()

    assert y == [7.0, -4, 1, 0, 2, 0.5, 0.5, 0, 3.5, 1, 0, 0, 0.5, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mr_gptqs_scale_is_its_formula(dtype: torch.dtype) -> None:
    x = spread(40, 64).to(dtype)
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.frexp(largest).exponent.to(dtype) - 3) / 0.75
    expected = (qsim.parse("e2m1")(blocks / scale) * scale).flatten(-2)

    y = qsim.parse("mxfp4_mr_gptq")(x)

    assert torch.equal(y, torch.where(x == 0, x, expected))


def test_mr_gptqs_scale_by_hand() -> None:
    """The scale is 2^(2 - 2) / 0.75 = 4/3, so that 7.5 does not saturate: 7.5 / (4/3) = 5.625 becomes 6."""
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([7.5, 1.0, -4.0])

    assert qsim.parse("mxfp4_mr_gptq")(x)[0, :3].tolist() == pytest.approx([8.0, 4 / 3, -4.0])


def if4_by_hand(x: Tensor) -> Tensor:
    """Round each block under one scale to E2M1 and to integers times 6/7, and keep what errs less."""
    unit, result = x.abs().max() / 6 / 448, x.clone().view(-1, 16)
    for block in result:
        scale = (block.abs().max() / 6 / unit).to(torch.float8_e4m3fn).float() * unit
        float4 = qsim.parse("e2m1")(block / scale) * scale
        int4 = (block / scale * 7 / 6).round().clamp(-7, 7) * 6 / 7 * scale
        better = (int4 - block).square().sum() < (float4 - block).square().sum()
        block.copy_(int4 if better else float4)
    return result.view(x.shape)


def test_if4_takes_the_better_element() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)[:, None]

    y = qsim.parse("if4")(x)

    assert torch.allclose(y, if4_by_hand(x), rtol=1e-5, atol=0)


def test_if4_by_hand() -> None:
    """The first block lies on integers under the scale 7/7, the second on E2M1 under the scale 6/6."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.0, 5.0, -3.0, 2.0])
    x[0, 16:20] = torch.tensor([6.0, 1.5, -0.5, 3.0])
    schemes = "scaled(e2m1, 16, scale=at_scale(e4m3, 1)), scaled(int4, 16, scale=at_scale(e4m3, 1))"

    assert torch.equal(qsim.parse(f"best([{schemes}])")(x), x)


def test_each_block_has_the_code_of_its_own_element() -> None:
    """7 is the code 7 of int4 under the scale 7/7, and 6 is the code 7 of E2M1 under the scale 6/6."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.0, 5.0, -3.0, 2.0])
    x[0, 16:20] = torch.tensor([6.0, 1.5, -0.5, 3.0])
    schemes = [f"scaled({element}, 16, scale=at_scale(e4m3, 1))" for element in ("e2m1", "int4")]

    encoded = qsim.parse(f"best([{', '.join(schemes)}])").encode(x)

    assert encoded.choice.tolist() == [[1, 0]]  # type: ignore[attr-defined]
    assert encoded.codes[0, :16].tolist() == qsim.parse(schemes[1]).encode(x).codes[0, :16].tolist()
    assert encoded.codes[0, 16:].tolist() == qsim.parse(schemes[0]).encode(x).codes[0, 16:].tolist()


@pytest.mark.parametrize(
    "text",
    [
        "if4",
        "razer_weights",
        "best([block(int4, 16), block(e2m1, 16)])",
        "best([block(int4, 16, symmetric=false), block(int3, 16, symmetric=false)])",
        "best([mx(e2m1, 16), mx(int4, 16), mx(e3m2, 16)])",
    ],
)
@pytest.mark.parametrize("shape", [(24, 44), (5,), (), (0, 8), (4, 0), (2, 3, 40)])
def test_codes_and_choices_give_the_weight(text: str, shape: tuple[int, ...]) -> None:
    weight, quantizer = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16(), qsim.parse(text)

    assert torch.equal(quantizer.decode(quantizer.encode(weight)), quantizer(weight))


def test_the_bits_of_codes_count_the_choices() -> None:
    """Four bits each, and for each block seven of a scale and one of the choice; two scales of the tensor."""
    encoded = qsim.parse("if4").encode(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))

    assert encoded.bits == 4 * 512 + (7 + 1) * 32 + 2 * 32


def test_each_of_stacked_weights_keeps_its_choices() -> None:
    generator, quantizer = torch.Generator().manual_seed(0), qsim.parse("if4")
    weights = [torch.randn(4, 32, generator=generator) for _ in range(2)]
    stack = qsim.Encoded.stack([quantizer.encode(weight) for weight in weights])

    assert all(torch.equal(quantizer.decode(stack[i]), quantizer(weight)) for i, weight in enumerate(weights))


def test_codes_without_choices_are_refused() -> None:
    with pytest.raises(qsim.QsimError, match="^these codes do not say which of the schemes of if4 each block has$"):
        qsim.parse("if4").decode(qsim.parse("nvfp4").encode(torch.ones(1, 16)))


def razer_by_hand(x: Tensor, specials: list[float], largest: float) -> Tensor:
    """Round each block to E2M1 and one more value, and keep the value that errs least; the first of equals."""
    unit, result = x.abs().max() / 6 / largest, x.clone().view(-1, 16)
    scales = qsim.parse("e4m3" if largest == 448 else "float(3, mantissa=3, specials=fn, signed=false)")
    for block in result:
        least = torch.inf
        for special in specials:
            scale = scales(block.abs().max() / max(6, abs(special)) / unit) * unit
            values = torch.tensor(sorted([*(s * v for s in (1, -1) for v in (0.5, 1, 1.5, 2, 3, 4, 6)), 0, special]))
            distance = (block[:, None] / scale - values).abs()
            tried = values[distance.argmin(-1)] * scale
            if (error := float((tried - result.new_tensor(block.tolist())).square().sum())) < least:
                least, best = error, tried
        block.copy_(best)
    return result.view(x.shape)


@pytest.mark.parametrize(
    ("name", "specials", "largest"), [("razer", [-5, 5], 448), ("razer_weights", [5, -5, 8, -8], 28)]
)
def test_razer_takes_the_best_special_value(name: str, specials: list[float], largest: float) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0, 32)[:, None]

    assert torch.allclose(qsim.parse(name)(x), razer_by_hand(x, specials, largest), rtol=1e-5, atol=0)


def test_razer_by_hand() -> None:
    """-5 stands for the second code of zero in one block, 5 in the other."""
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([6.0, -5.0, 4.0])
    x[0, 16:19] = torch.tensor([-6.0, 5.0, 1.5])

    assert torch.allclose(qsim.parse("razer")(x), x, rtol=1e-6)
    assert qsim.parse("nvfp4")(x)[0, 1].item() == pytest.approx(-4.0)


def test_msfp_shares_an_exponent_over_integers() -> None:
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    exponent = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).log2().floor()
    step = torch.exp2(exponent - 2)  # MSFP12: sign and three mantissa bits below the shared exponent

    y = qsim.parse("msfp12")(x)

    assert torch.equal(y, ((x.unflatten(-1, (-1, 16)) / step).round().clamp(-7, 7) * step).flatten(-2))


def test_deepseeks_tiles_share_a_scale_over_rows_and_columns() -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)
    for row in range(0, 200, 128):
        for column in range(0, 300, 128):
            tile = x[row : row + 128, column : column + 128]
            scale = tile.abs().max() / 448
            expected[row : row + 128, column : column + 128] = (tile / scale).to(torch.float8_e4m3fn).float() * scale

    assert torch.equal(qsim.parse("deepseek_weights")(x), expected)
    assert torch.equal(qsim.parse("deepseek_activations")(x), qsim.parse("block(e4m3, [1, 128])")(x))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp8_e4m3", 8.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25), ("mxint8", 8.25), ("msfp12", 4.5), ("msfp16", 8.5),
     ("mx4", 4), ("mx6", 6), ("mx9", 9), ("hif4", 4.5), ("mxfp4_mr_gptq", 4.25), ("nvfp4(scale=e5m3)", 4.5),
     ("if4", 4.5 + 32 / 2**20), ("razer", 4.5 + 32 / 2**20), ("razer_weights", 4.5 + 32 / 2**20),
     ("nvfp4", 4.5 + 32 / 2**20), ("deepseek_weights", 8 + 32 / 2**14), ("deepseek_activations", 8.25)],
)  # fmt: skip
def test_bits_are_those_of_the_papers(name: str, bits: float) -> None:
    assert qsim.parse(name).bits_per_element(torch.Size([1024, 1024])) == bits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mx(e8m0)", "mx: e8m0 has no values at or below zero: it can be a scale, not an element"),
        ("mx(e4m3, scale=int8)", "mx: int8 as a scale needs a scale of its own, like scaled(int8, channel)"),
        ("nvfp4(scale=scaled(e4m3(full_scale=500)))", "float: full_scale is at most the largest value, 448, not 500"),
        ("mx(e4m3(full_scale=256))", "mx: rule floor cannot follow the convention of"),
        ("best([block(int4, 16)])", "best: give at least two schemes"),
        ("best([block(int4, 16), block(e2m1, 32)])", "best: block(e2m1, n=32) does not have the blocks of n elements"),
        ("best([token(int4), token(e2m1)])", "best: token(int4) does not have the blocks of n elements"),
        (
            "best([block(int4, 16, static=true), block(int4, 16)])",
            "best: block(int4, n=16, static=true) has static or learned scales; here they are found anew",
        ),
        ("microexponent(0)", "microexponent: n should be greater than 0, not 0"),
        ("mx(e4m3, n=0)", "mx: n should be greater than 0, not 0"),
        ("mx(e4m3, rule=down)", "mx: rule should be 'divide', 'floor', 'ceil', 'even' or 'rceil', not 'down'"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(message)


class TestFourOverSix(CalibratorSuite):
    text = "four_over_six"


class TestMx(QuantizerSuite):
    text = (
        "nvfp4_adaptive",
        "mx6",
        "hif4",
        "if4",
        "razer_weights",
        "mxfp4_mr_gptq",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "mxfp6_e2m3",
        "mxfp4",
        "mxint8",
        "nvfp4",
        "msfp12",
        "deepseek_activations",
    )


class TestTiles(QuantizerSuite):
    text = "deepseek_weights"
    shapes = ((6, 40), (3, 5, 33), (2, 2, 3, 8))
