"""Shared by the tests of fast: schemes and values that reach every branch of the kernels, and small models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from qsim_fast import int8
from qsim_listing.accelerator_check import special_values
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.quantizer import Quantizer

INT8 = [
    ("channel(int8)", "token(int8)"),
    ("channel(int4)", "token(int8, symmetric=false)"),
    ("channel(uint8, symmetric=false)", "token(int8)"),
    ("channel(int4, symmetric=false)", "token(uint8, symmetric=false)"),
    ("tensor(int8)", "tensor(uint4, symmetric=false)"),
    ("channel(int8, range=mse)", "token(int6, range=absmax, symmetric=false)"),
    ("channel(int8, scale=bf16)", "token(int8, rule=floor)"),
    ("channel(int8)", "token(uint8)"),
]


SCHEMES = [
    "token(int8)",
    "token(int4, symmetric=false)",
    "token(int8, symmetric=false, range=absmax)",
    "token(uint8)",
    "channel(int(4, narrow=false, convention=gptq))",
    "tensor(int8)",
    "tensor(int8, symmetric=false)",
    "token(e4m3)",
    "token(e5m2, range=absmax)",
    "token(float(4, mantissa=3, specials=fnuz))",
    "token(float(3, mantissa=2, signed=false))",
    "abfp(int4, n=64)",
    "abfp(int8, n=50, scale=fp16)",
    "abfp(int4, scale=e4m3)",
    "abfp(int4, scale=e8m0)",
    "abfp(int4, scale=scaled(int8, channel))",
    "block(int4, n=16, symmetric=false)",
    "block(int4, n=16, symmetric=false, scale=bf16)",
    "block(e2m1, n=16, scale=scaled(int8))",
    "nvfp4",
    "nvfp4(scale=scaled(e4m3(full_scale=256)))",
    "nvfp4(scale=e5m3)",
    "mxfp4_mr_gptq",
    "mx6",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp8_e5m2",
    "mxint8",
    "mx(e2m1, rule=ceil)",
    "mx(e4m3, rule=even)",
    "mx(e3m2, rule=rceil)",
    "mx(int4, rule=divide)",
    "msfp12",
]
FORMATS = ["int8", "uint4", "int(6, fraction=3)", "e4m3", "e5m2", "e4m3fnuz", "binary8p3", "e2m3"]
FORMATS += ["float(5, mantissa=2, specials=ieee, saturate=true)", "float(4, mantissa=3, specials=fn, saturate=false)"]
SCHEMES += ["mx(uint4)", "abfp(int(5, narrow=false, fraction=10), n=2, rule=rceil)"]
WITHOUT_KERNELS = ["abfp(int4, n=32, scale=block(e4m3, n=[2, 2]))", "abfp(int4, scale=fp16(rounding=stochastic))"]
WITHOUT_KERNELS += [
    "block(e4m3, n=[8, 8])",
    "token(int4, range=mse)",
    "token(int8(rounding=stochastic))",
    "token(e3m0)",
    "nvfp4_adaptive",
    "hif4",
]


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    """[24, 200]: the values by which `qsim plugins --check` compares, and six ordinary rows."""
    ordinary = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    return torch.cat([special_values(), ordinary]).to(dtype)


def assert_same_bits(fast: Tensor, slow: Tensor) -> None:
    assert fast.dtype == slow.dtype and fast.stride() == slow.stride()
    number = ~slow.isnan()
    assert torch.equal(fast.isnan(), slow.isnan())
    kind = {2: torch.int16, 4: torch.int32}[fast.element_size()]
    assert torch.equal(fast[number].view(kind), slow[number].view(kind))


class Layer(nn.Module):
    """A linear, or transformers' Conv1D."""

    def __init__(self, columns: int = 96, rows: int = 40, bias: bool = True, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.transposed = transposed
        weight = torch.randn(rows, columns, generator=generator)
        self.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        self.bias = nn.Parameter(torch.randn(rows, generator=generator)) if bias else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:
            flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)  # type: ignore[arg-type]
            return flat.view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


def example() -> Tensor:
    """[3, 17, 96], one column an outlier."""
    x = torch.randn(3, 17, 96, generator=torch.Generator().manual_seed(2))
    x[..., 5] *= 30
    return x


class Convolution(nn.Module):
    """A convolution of any number of dimensions, by torch's function."""

    def __init__(self, space: int, groups: int = 1, bias: bool = True, taps: int = 3, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
        self.options = {**options, "groups": groups}
        self.weight = nn.Parameter(torch.randn(12, 8 // groups, *[taps] * space, generator=generator))
        self.bias = nn.Parameter(torch.randn(12, generator=generator)) if bias else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, **self.options)


def quantized(text: str, x: Tensor) -> Tensor:
    quantizer = qsim.parse(text)
    assert isinstance(quantizer, Quantizer)
    return quantizer.quantize(x)


def ulps(x: Tensor, exact: Tensor) -> float:
    """The largest difference to a float64 result, in units of the last place of float32."""
    nearest = exact.float().abs()
    step = torch.nextafter(nearest, torch.tensor(torch.inf)).double() - nearest.double()
    return float(((x.double() - exact).abs() / step).max())


def in_float64(text: str, rows: Tensor) -> Tensor:
    """The exact values of the codes of rows, [M, K]."""
    made = int8.encode_rows(qsim.parse(text), rows)
    assert made is not None
    units = made.codes.double() - (0.0 if made.zero is None else made.zero.unsqueeze(-1))
    assert torch.allclose(made.values(), quantized(text, rows).reshape(units.shape), rtol=1e-6, atol=0)
    return units * made.scale.double().unsqueeze(-1)
