"""A checkpoint that `qsim export` writes is read by `qsim check`: the same bits, and nothing found wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import make, tokens
from qsim_interop.reading import open_checkpoint
from qsim_interop.writing import export

import qsim_core as qsim
from qsim_core.cli.main import main

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    ("compressed-tensors", "block(int4, 16, symmetric=false)"),
    ("compressed-tensors", "channel(int3)"),
    ("compressed-tensors", "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))"),
    ("torchao", "block(uint4, 32, symmetric=false)"),
    ("torchao", "channel(e4m3)"),
]


@pytest.mark.parametrize(("to", "weights"), CASES)
def test_what_is_written_is_read(to: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip(to.replace("-", "_"))
    simulation = qsim.simulate(make("llama"), weights=weights, skip=["lm_head"], example={"input_ids": tokens()})
    export(simulation, qsim.LoadedModel(simulation.model), to, tmp_path / "out")

    checkpoint = open_checkpoint(tmp_path / "out")
    found = {layer.weight: checkpoint.read(layer).dequantize() for layer in checkpoint.layers}

    encoded = simulation.encoded()
    assert found.keys() == encoded.keys()
    assert all(torch.equal(found[name], weight.decode()) for name, weight in encoded.items())
    assert CliRunner().invoke(main, ["check", str(tmp_path / "out")]).exit_code == 0


def test_a_gguf_file_that_is_written_has_nothing_wrong(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    simulation = qsim.simulate(make("llama"), weights="mxfp4", skip=["lm_head"], example={"input_ids": tokens()})
    export(simulation, qsim.LoadedModel(simulation.model), "gguf", tmp_path / "out")

    run = CliRunner().invoke(main, ["check", str(tmp_path / "out" / "model.gguf")])

    assert run.exit_code == 0, run.output
    assert "mxfp4" in run.output
