"""GGUF files: each weight is the one that llama.cpp's own library dequantizes, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qsim_interop.reading import open_checkpoint

from qsim_core.cli.main import main
from qsim_core.errors import ModelError

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
N, K = 8, 256


def write(file: Path, packed: dict[str, np.ndarray], of: str) -> Path:
    """A file with packed tensors [rows, bytes of a row] of a type, and plain ones in float32."""
    writer = gguf.GGUFWriter(file, "llama")
    for name, data in packed.items():
        writer.add_tensor(name, data, raw_dtype=TYPES[of] if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def octets(of: str) -> np.ndarray:
    """Weights [N, K] as bytes of a type: quantized by the library if it does, else bytes at random."""
    values = np.random.default_rng(0).standard_normal((N, K), dtype=np.float32)
    try:
        return gguf.quants.quantize(values, TYPES[of])
    except NotImplementedError:
        size, count = gguf.GGML_QUANT_SIZES[TYPES[of]]
        return np.random.default_rng(0).integers(0, 60, (N, K // size * count), dtype=np.uint8)


@pytest.mark.parametrize(
    ("of", "text", "bits"),
    [
        ("Q4_0", "block(int(4, narrow=false), n=32, scale=fp16)", 4.5),
        ("Q8_0", "block(int8, n=32, scale=fp16)", 8.5),
        ("MXFP4", "mxfp4", 4.25),
        ("NVFP4", "nvfp4", 4.5),
    ],
)
def test_a_weight_is_the_one_that_gguf_dequantizes(of: str, text: str, bits: float, tmp_path: Path) -> None:
    data = octets(of)
    file = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": data, "norm.weight": np.ones(4, np.float32)}, of)

    checkpoint = open_checkpoint(file)
    (layer,) = checkpoint.layers
    found = checkpoint.read(layer).dequantize()

    assert (str(layer.weights), layer.shape, checkpoint.tensors[layer.weight].bits / N / K) == (text, (N, K), bits)
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(data, TYPES[of])))


def test_nvfp4s_global_scale_is_multiplied_last_as_in_llama_cpp(tmp_path: Path) -> None:
    data, wide = octets("NVFP4"), np.array([0.3], np.float32)

    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"fc.weight": data, "fc.scale": wide}, "NVFP4"))
    found = checkpoint.read(checkpoint.layers[0]).dequantize()

    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(data, TYPES.NVFP4) * wide))


def test_of_another_type_the_values_are_read_and_the_note_says_so(tmp_path: Path) -> None:
    data = octets("Q4_K")
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"fc.weight": data}, "Q4_K"))
    (layer,) = checkpoint.layers

    found = checkpoint.dequantize(layer)

    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(data, TYPES.Q4_K)))
    assert "Q4_K: qsim has no such quantizer; the values are those that gguf dequantizes" in checkpoint.notes
    with pytest.raises(ModelError, match="fc is of type Q4_K: its values alone are read, by `dequantize`"):
        checkpoint.read(layer)


def test_check_tells_the_recipe_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", {f"blk.{n}.ffn_up.weight": octets("Q4_0") for n in range(2)}, "Q4_0")

    run = CliRunner().invoke(main, ["check", str(file), "--json"])

    said = json.loads(run.output)
    weights = {"weights": "block(int(4, narrow=false), n=32, scale=fp16)"}
    assert (run.exit_code, said["bits_per_weight"]) == (0, 4.5)
    assert said["recipe"]["overrides"] == {"*.ffn_up": weights}


def test_a_scale_that_is_not_finite_is_found(tmp_path: Path) -> None:
    data = octets("Q8_0")
    data[0, :2] = 0xFF, 0x7F

    run = CliRunner().invoke(main, ["check", str(write(tmp_path / "m.gguf", {"fc.weight": data}, "Q8_0"))])

    assert run.exit_code == 1
    assert f"Finding: fc: 1 of {N * K // 32} values of scales are not finite\n" in run.output


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", {"fc.weight": octets("Q8_0")}, "Q8_0")
    file.write_bytes(file.read_bytes()[:100])

    run = CliRunner().invoke(main, ["check", str(file)])

    assert run.exit_code == 1
    assert "m.gguf is not a GGUF file, or is corrupt: " in run.stderr
    assert run.stderr.count("\n") == 1
