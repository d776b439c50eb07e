"""The quantizers of deployed stacks give the bits of the stacks' own libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qsim_core as qsim
from qsim_core.testing import QuantizerSuite


def weights() -> torch.Tensor:
    """Values of many magnitudes, ties, zeros, and blocks of zeros."""
    torch.manual_seed(0)
    x = torch.randn(24, 256) * torch.linspace(-12, 6, 24).exp2().unsqueeze(1)
    x[3] = (torch.arange(256) - 128) / 16
    x[4, :64], x[5] = 0.0, 0.0
    x[6, 0], x[7] = -9.0, x[7].abs()
    return x


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_llama_cpps_formats_have_the_bits_of_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    quants, of = gguf.quants, gguf.GGMLQuantizationType[kind]
    x = weights()

    found = qsim.parse(f"llama_cpp_{kind.lower()}").quantize(x)

    wanted = torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), of), of))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("vllm_nvfp4", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("vllm_fp8", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("vllm_int8", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ],
)
def test_vllms_formats_have_the_bits_of_compressed_tensors(name: str, scheme: dict[str, Any]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    fake_quantize = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward").fake_quantize
    x = weights()
    group = scheme.get("group_size", x.shape[1])
    if group == 16:
        scheme = {**scheme, "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    given = quantization.QuantizationArgs(**scheme, symmetric=True)
    whole = helpers.generate_gparam(x.amin(), x.amax()) if group == 16 else None
    blocks = x.unflatten(-1, (-1, group))
    scale, zero = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), given, global_scale=whole)

    found = qsim.parse(name).quantize(x)

    assert torch.equal(found, fake_quantize(x, scale, zero, given, global_scale=whole))


class TestQ4(QuantizerSuite):
    text = "llama_cpp_q4_0"


class TestQ8(QuantizerSuite):
    text = "llama_cpp_q8_0"


class TestNvfp4(QuantizerSuite):
    text = "vllm_nvfp4"
