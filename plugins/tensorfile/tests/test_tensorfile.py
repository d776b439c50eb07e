"""`qsim quantize` rounds a file of tensors, with one tensor in memory at a time, or a few rows where possible."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import qsim_core as qsim
from qsim_core.cli.main import main


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "fc.weight": noise(8, 100),
    "fc.bias": noise(8),
    "half.weight": noise(6, 64).bfloat16(),
    "conv.weight": noise(5, 4, 3, 3),
    "experts": noise(2, 6, 32),
    "embed.weight": noise(10, 16).half(),
    "ids": torch.arange(12).view(3, 4),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def test_weights_are_rounded_and_everything_else_is_copied(source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "out.safetensors", "--weights", "abfp(int4, n=16)", "--skip", "*embed*")

    out, quantizer = load_file(tmp_path / "out.safetensors"), qsim.parse("abfp(int4, n=16)")
    assert outcome.exit_code == 0, outcome.output
    for name in ("fc.weight", "half.weight", "experts"):
        assert torch.equal(out[name], quantizer(TENSORS[name]))
    for name in ("fc.bias", "embed.weight", "ids", "empty", "mask"):
        assert torch.equal(out[name], TENSORS[name])
        assert out[name].dtype == TENSORS[name].dtype


def test_a_kernels_rows_run_over_taps_and_inputs_as_in_a_simulation(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", "--weights", "abfp(int4, n=16)")
    conv = torch.nn.Conv2d(4, 5, 3, bias=False)
    conv.weight.data.copy_(TENSORS["conv.weight"])
    x = noise(1, 4, 6, 6)
    with qsim.simulate(conv, weights="abfp(int4, n=16)"), torch.no_grad():
        simulated = conv(x)

    rounded = load_file(tmp_path / "out.safetensors")["conv.weight"]

    assert torch.equal(torch.nn.functional.conv2d(x, rounded), simulated)


def test_a_bare_format_is_rounded_by_channel_and_every_tensor_is_reported(source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "out.safetensors", "--weights", "int8", "--json")

    report = {row["name"]: row for row in json.loads(outcome.stdout)}
    assert report["fc.weight"]["quantizer"] == "channel(int8)"
    assert report["fc.weight"]["bits"] == 8 + 32 / 100
    assert 35 < report["fc.weight"]["sqnr_db"] < 55
    nothing = dict.fromkeys(("quantizer", "sqnr_db", "bits", "decodes"))
    assert report["ids"] == {"name": "ids", "shape": [3, 4], **nothing}


def test_the_table_says_what_was_done(source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "out.safetensors", "--weights", "bf16", "--skip", "conv*")

    assert "half.weight" in outcome.stdout
    assert f"4 of 9 tensors rounded, the others copied, to {tmp_path}/out.safetensors" in " ".join(
        outcome.stdout.split()
    )


def test_metadata_and_order_stay(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", "--weights", "int8")

    def header(path: Path) -> bytes:
        data = path.read_bytes()
        return data[: 8 + int.from_bytes(data[:8], "little")]

    assert header(tmp_path / "out.safetensors") == header(source)


@pytest.mark.parametrize(
    "text", ["abfp(int4)", pytest.param("abfp(int4(rounding=stochastic))", marks=pytest.mark.slow)]
)
def test_memory_is_bounded_by_the_largest_tensor(text: str, tmp_path: Path) -> None:
    """With four tensors of 32 MiB the peak grows by two of them and one part, over the program's own memory."""
    save_file(
        {f"w{i}": noise(4096, 64, seed=i).bfloat16().repeat(1, 64) for i in range(4)}, tmp_path / "in.safetensors"
    )
    save_file({"w": noise(8, 64)}, tmp_path / "small.safetensors")
    program = (
        "import resource, sys; from pathlib import Path; import qsim_core as q; from qsim_tensorfile.rounding import quantize_file\n"
        "quantize_file(Path(sys.argv[1]), Path('out.safetensors'), q.parse(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(name: str) -> int:
        command = [sys.executable, "-c", program, name, text]
        return int(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)

    grown = (peak("in.safetensors") - peak("small.safetensors")) / 1024

    assert grown < 2 * 32 + 160, f"{grown:.0f} MiB"


@pytest.mark.parametrize(
    "text",
    [
        "abfp(int4, n=64)",
        "abfp(e4m3(rounding=stochastic), n=64)",
        "channel(nf4(rounding=stochastic))",
        "abfp(int4, n=64, scale=scaled(int8(rounding=stochastic), channel))",
        "block(int4, [1, 64], range=percentile(99))",
        "block(int4, [2, 64])",
        "nvfp4",
        "tensor(int4, static=true)",
        "cast(e4m3)",
    ],
)
def test_a_tensor_that_is_rounded_in_parts_has_the_same_bits(text: str, tmp_path: Path) -> None:
    x = noise(2, 3, 250_001)
    save_file({"experts": x}, tmp_path / "in.safetensors")

    run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--weights", text)

    assert torch.equal(load_file(tmp_path / "out.safetensors")["experts"], qsim.parse(text)(x))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("", ["--weights", "int99"], "no quantizer 'int99'"),
        ("", ["--weights", "none"], "--weights none rounds nothing; name a quantizer, like 'block(int4, 64)'"),
        ("", ["--weights", "int4", "--skip", "nothing*"], "pattern 'nothing*' matches no tensor. There are: "),
        ("", ["--weights", "int4", "--skip", "*"], "holds no weight to round: no float tensor of two axes that is not skipped"),
        ("nan", ["--weights", "int4"], "fc.weight holds NaN or Inf; it cannot be rounded"),
        ("corrupt", ["--weights", "int4"], "in.safetensors is not a safetensors file, or is corrupt: "),
        ("missing", ["--weights", "int4"], "cannot read "),
        ("huge", ["--weights", "cast(e5m2)"], "fc.weight overflows in cast(e5m2); a scale keeps it in range, as in channel(F)"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    change: str, arguments: list[str], message: str, source: Path, tmp_path: Path
) -> None:
    if change == "nan":
        save_file({"fc.weight": torch.tensor([[1.0, torch.nan]])}, source)
    elif change == "huge":
        save_file({"fc.weight": torch.tensor([[1.0, 1e6]])}, source)
    elif change == "corrupt":
        source.write_bytes(source.read_bytes()[:-50])
    elif change == "missing":
        source.unlink()
    before = sorted(tmp_path.iterdir())

    outcome = run(source, tmp_path / "out.safetensors", *arguments)

    assert outcome.exit_code == 1
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_output_is_no_directory_and_not_the_input(source: Path, tmp_path: Path) -> None:
    assert "is a directory" in run(source, tmp_path, "--weights", "int4").stderr
    assert (
        "in.safetensors is the input; give the output another name" in run(source, source, "--weights", "int4").stderr
    )


def test_a_device_is_no_input(tmp_path: Path) -> None:
    outcome = run("/dev/null", tmp_path / "out.safetensors", "--weights", "int4")

    assert outcome.stderr.startswith("Error: cannot read /dev/null: ")


def test_a_full_disk_leaves_no_half_of_a_file(source: Path, tmp_path: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    run = subprocess.run(
        [sys.executable, "-B", "-m", "qsim_core", "quantize", str(source), "out.safetensors", "--weights", "int4", "-q"],
        cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_disk,
    )  # fmt: skip

    assert run.stderr == "Error: cannot write out.safetensors: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


CODES = {
    "layer.weight": noise(16, 32).to(torch.float8_e4m3fn),
    "layer.weight_scale": noise(16, 1),
    "packed.qweight": torch.ones(4, 16, dtype=torch.int32),
    "packed.scales": noise(2, 16).half(),
    "packed.bias": noise(2, 16),
    "head.weight": noise(8, 32),
    "head.scale": noise(8, 32),
}


def test_scales_of_weights_that_are_stored_quantized_are_copied(tmp_path: Path) -> None:
    save_file(CODES, tmp_path / "in.safetensors")

    outcome = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--weights", "int4")

    out = load_file(tmp_path / "out.safetensors")
    changed = {name for name, tensor in CODES.items() if not torch.equal(out[name].float(), tensor.float())}
    assert changed == {"packed.bias", "head.weight", "head.scale"}
    assert outcome.stderr == (
        f"Warning: weights of {tmp_path}/in.safetensors that are stored quantized (F8_E4M3, I32) stay so, with their scales\n"
    )


def test_a_file_of_quantized_weights_alone_is_refused(tmp_path: Path) -> None:
    save_file({name: CODES[name] for name in ("layer.weight", "layer.weight_scale")}, tmp_path / "in.safetensors")

    outcome = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--weights", "int4")

    assert "are quantized already, as F8_E4M3 with scales; round the checkpoint" in outcome.stderr


@pytest.mark.parametrize("name", ["out.gguf", "out", "out.bin"])
def test_an_output_of_another_kind_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / name, "--weights", "int4")

    assert outcome.exit_code == 1
    assert outcome.stderr.endswith(f"give {tmp_path}/{name} a name that ends in .safetensors\n")
    assert not (tmp_path / name).exists()
