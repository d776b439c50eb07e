"""Under `fused` a server that fuses q/k/v and gate/up finds one global scale in the files, and the simulation's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import make, save_small, tokens
from qsim_interop.reading import examine, open_checkpoint
from qsim_interop.writing import export

import qsim_core as qsim
from qsim_core.cli.main import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("qsim_fused")
pytestmark = pytest.mark.filterwarnings("ignore")

NVFP4 = "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))"


def exported(directory: Path, *transforms: str, weights: str = NVFP4) -> qsim.Simulation:
    """A Llama whose fused layers have weights of different size, exported with transforms."""
    model = make("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("k_proj.weight", "up_proj.weight")):
                parameter.mul_(3.3)
    recipe = {"weights": weights, "skip": ["lm_head"], "transforms": transforms}
    simulation = qsim.simulate(model, recipe, calibration=[{"input_ids": tokens()}])
    export(simulation, qsim.LoadedModel(model), "compressed-tensors", directory)
    return simulation


@pytest.mark.parametrize(("weights", "after"), [(NVFP4, ()), (NVFP4, ("gptq",)), ("vllm_nvfp4", ())])
def test_check_finds_no_scales_that_differ(weights: str, after: tuple[str, ...], tmp_path: Path) -> None:
    for name in after:
        pytest.importorskip(f"qsim_{name}")
    exported(tmp_path / "apart", *after, weights=weights)
    exported(tmp_path / "fused", "fused", *after, weights=weights)

    apart, fused = (examine(open_checkpoint(tmp_path / name)).findings for name in ("apart", "fused"))

    assert {finding.what.partition(" differ")[0] for finding in apart} == {
        "the global scales of q_proj, k_proj, v_proj",
        "the global scales of gate_proj, up_proj",
    }
    assert fused == []


def test_transformers_loads_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors.compressors")
    simulation = exported(tmp_path / "out", "fused")

    config = transformers.CompressedTensorsConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=config
    )

    assert all(torch.equal(model.get_parameter(name), weight.decode()) for name, weight in simulation.encoded().items())


def test_the_command_line_names_it(tmp_path: Path) -> None:
    pytest.importorskip("qsim_zoo")
    small, text = save_small(tmp_path / "small"), tmp_path / "text.txt"
    text.write_text("One scale for three layers. " * 400)
    options = ["--plugin", "fused", "--skip", "lm_head", "--calibration-data", str(text), "--to", "compressed-tensors"]
    command = ["export", str(small), "--weights", NVFP4, *options, "--output", str(tmp_path / "out"), "--quiet"]

    run = CliRunner().invoke(main, command)
    check = CliRunner().invoke(main, ["check", str(tmp_path / "out")])

    assert run.exit_code == 0, run.output
    assert check.exit_code == 0, check.output
