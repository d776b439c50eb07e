"""Checkpoints of GPTQ, AWQ and FP8: each weight is that of an independent reading of the format, to the bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from qsim_interop.reading import examine, open_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from qsim_core.errors import ModelError

N, K, SIZE = 16, 96, 32


def write(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def numbers(*shape: int, low: int = 0, high: int = 16) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


def words(codes: list[int], bits: int) -> list[int]:
    """Codes as one long number, lowest bits first, cut into signed words of 32 bits."""
    whole = sum(code << (bits * place) for place, code in enumerate(codes))
    cut = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in cut]


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, less: int) -> dict[str, Tensor]:
    """Codes [N, K], zero points and scales [groups, N] as GPTQ packs them; zero points are stored `less` by so much."""
    return {
        "fc.qweight": torch.tensor([words(row.tolist(), bits) for row in codes], dtype=torch.int32).T,
        "fc.qzeros": torch.tensor([words(row.tolist(), bits) for row in zeros - less], dtype=torch.int32),
        "fc.scales": scales,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptqs_codes_lie_along_the_inputs_and_zero_points_may_be_stored_less_one(
    bits: int, layout: str, less: int, tmp_path: Path
) -> None:
    codes = numbers(N * 2, K, high=2**bits)
    zeros = numbers(K // SIZE, N * 2, low=1, high=2**bits)
    scales = (torch.rand(K // SIZE, N * 2, generator=torch.Generator().manual_seed(1)) + 0.1).half()
    config = {"bits": bits, "group_size": SIZE, "sym": False, "checkpoint_format": layout}
    write(tmp_path, gptq(codes, zeros, scales, bits, less), quant_method="gptq", **config)

    checkpoint = open_checkpoint(tmp_path)
    (layer,) = checkpoint.layers
    found = checkpoint.read(layer).dequantize()

    group = torch.arange(K) // SIZE
    assert str(layer.weights) == f"block(int{bits}, n={SIZE}, scale=fp16, symmetric=false)"
    assert torch.equal(found, (codes - zeros.T[:, group]).float() * scales.T.float()[:, group])


def test_gptqs_act_order_gives_each_input_its_group(tmp_path: Path) -> None:
    codes, order = numbers(N, K), numbers(K, high=K // SIZE).int()
    scales = (torch.arange(K // SIZE * N).view(-1, N) + 1).half()
    tensors = gptq(codes, torch.full((K // SIZE, N), 8), scales, 4, 1) | {"fc.g_idx": order}
    write(tmp_path, tensors, quant_method="gptq", bits=4, group_size=SIZE, sym=True, desc_act=True)

    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.read(checkpoint.layers[0])

    assert checkpoint.kind == "gptq (gptq, act-order)"
    assert found.zero_points is None
    assert torch.equal(found.dequantize(), (codes - 8).float() * scales.T.float()[:, order.long()])


def test_awq_is_what_compressed_tensors_converts_it_to(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
    tensors = {
        "fc.qweight": numbers(K, N // 8, low=-(2**31), high=2**31).int(),
        "fc.qzeros": numbers(K // SIZE, N // 8, low=-(2**31), high=2**31).int(),
        "fc.scales": torch.rand(K // SIZE, N, generator=torch.Generator().manual_seed(0)).half(),
    }
    write(tmp_path, tensors, quant_method="awq", bits=4, group_size=SIZE, zero_point=True, version="gemm")

    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.read(checkpoint.layers[0]).dequantize()

    converter = AutoAWQConverter(group_size=SIZE)
    (scheme,) = converter._build_quant_config().config_groups.values()
    state = {name.removeprefix("fc."): tensor for name, tensor in converter.process(dict(tensors)).items()}
    state["weight_scale"] = state["weight_scale"].float()
    assert torch.equal(
        found, BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    )


@pytest.mark.parametrize(("size", "filled"), [(32, 4), (-1, 1)])
def test_awqs_gemv_has_its_codes_along_the_inputs(size: int, filled: int, tmp_path: Path) -> None:
    codes, group = numbers(N, K), torch.arange(K) // (size if size > 0 else K)
    zeros, scales = (torch.zeros(N, 8 * filled, dtype=kind) for kind in (torch.int64, torch.float16))
    groups = int(group.max()) + 1
    zeros[:, :groups], scales[:, :groups] = numbers(N, groups), (numbers(N, groups) + 1).half()
    packed = {
        name: torch.tensor([words(row.tolist(), 4) for row in rows], dtype=torch.int32)
        for name, rows in (("qweight", codes), ("qzeros", zeros))
    }
    tensors = {"fc.scales": scales} | {f"fc.{name}": tensor for name, tensor in packed.items()}
    write(tmp_path, tensors, quant_method="awq", bits=4, group_size=size, version="gemv")

    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.read(checkpoint.layers[0]).dequantize()

    assert torch.equal(found, (codes - zeros[:, group]).float() * scales[:, group].float())
    assert examine(checkpoint).findings == []


def test_pickles_are_named_and_not_loaded(tmp_path: Path) -> None:
    write(tmp_path, {}, quant_method="torchao")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(
        ModelError, match="pytorch_model.bin is corrupt, or a pickle with more .*, which could run code; load it where"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("powers", [False, True])
def test_fine_grained_fp8_is_what_transformers_dequantizes(powers: bool, tmp_path: Path) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    scale = scale.to(torch.float8_e8m0fnu) if powers else scale
    tensors = {"fc.weight": weight, "fc.weight_scale_inv": scale}
    write(tmp_path, tensors, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")

    checkpoint = open_checkpoint(tmp_path)
    (layer,) = checkpoint.layers
    found = checkpoint.read(layer).dequantize()

    assert str(layer.weights) == f"block(e4m3, n=[128, 128]{', scale=e8m0' if powers else ''})"
    assert str(layer.activations) == "block(e4m3, n=128)"
    assert torch.equal(found, finegrained.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32))


def test_fp8_by_tensor_has_one_scale_and_a_last_tile_may_be_short(tmp_path: Path) -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    one, tiles = tmp_path / "one", tmp_path / "tiles"
    one.mkdir()
    tiles.mkdir()
    by_tensor = {"fc.weight": weight, "fc.weight_scale": torch.tensor(0.3), "fc.input_scale": torch.tensor(2.0)}
    write(one, by_tensor, quant_method="fp8", activation_scheme="static")
    by_tile = {"fc.weight": weight, "fc.weight_scale_inv": torch.arange(1.0, 7).view(2, 3)}
    write(tiles, by_tile, quant_method="fp8", weight_block_size=[128, 128])

    single, tiled = open_checkpoint(one), open_checkpoint(tiles)

    assert torch.equal(single.read(single.layers[0]).dequantize(), weight.float() * 0.3)
    assert str(single.layers[0].activations) == "tensor(e4m3, static=true)"
    assert torch.equal(tiled.read(tiled.layers[0]).dequantize()[128:, 256:], weight.float()[128:, 256:] * 6)


def test_layers_that_a_method_usually_leaves_are_not_findings(tmp_path: Path) -> None:
    tensors = gptq(numbers(N, K), torch.full((K // SIZE, N), 8), torch.ones(K // SIZE, N).half(), 4, 1)
    plain = {f"{name}.weight": torch.ones(4, 4) for name in ("lm_head", "layers.0.mlp.gate", "embed_tokens", "odd")}
    write(tmp_path, tensors | plain, quant_method="gptq", bits=4, group_size=SIZE)

    found = examine(open_checkpoint(tmp_path))

    assert [str(finding) for finding in found.findings] == [
        "odd: is not packed (F32), and the configuration targets it"
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "has the layout 'marlin', whose words are ordered for one kernel; of gptq, gptq and gptq_v2 are read"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "has the layout 'marlin'"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "has 4 bits in the layout 'gemv_fast'; of awq, gemm and gemv of 4 bits are read"),
        ({"quant_method": "gptq", "bits": "four"}, "its quantization_config cannot be read: "),
        ({"quant_method": "gptq", "group_size": 40}, "fc: its groups of 40 do not divide K = 96; fetch or quantize"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_so(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = gptq(numbers(N, K), torch.full((K // SIZE, N), 8), torch.ones(K // SIZE, N).half(), 4, 1)
    path = write(tmp_path, tensors, **config)

    with pytest.raises(ModelError) as error:
        (checkpoint := open_checkpoint(path)).read(checkpoint.layers[0])

    assert message in str(error.value)
