"""The CodeGen adapter on a directory that the test writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, build, write
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.structure.structure import trace
from qsim_core.testing import AdapterSuite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(build("CodeGen"), tmp_path / "codegen")


def test_from_the_command_line_all_but_lm_head_is_quantized(folder: Path, tmp_path: Path) -> None:
    text, record = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)
    options = ["--precision", "w4a8", "--data", str(text), "--set", "perplexity.seqlen=64", "--json", str(record), "-q"]

    run = CliRunner().invoke(main, ["evaluate", str(folder), *options])

    assert run.exit_code == 0, run.output
    result = json.loads(record.read_text())
    assert (result["adapter"], result["metric"]) == ("codegen", "perplexity")
    assert (result["audit"]["skipped"], result["audit"]["covered"], result["audit"]["found"]) == (["lm_head"], 12, 13)


def test_tracing_finds_the_one_norm_of_a_block_and_the_heads_in_the_fused_weight(folder: Path) -> None:
    model = qsim.parse("codegen").load(str(folder), torch.float32).model

    found = trace(model, FAMILIES["CodeGen"].example)

    readers = {group.norm: group.weights for group in found.groups}
    assert readers["transformer.h.0.ln_1"] == [
        "transformer.h.0.attn.qkv_proj.weight",
        "transformer.h.0.mlp.fc_in.weight",
    ]
    assert [(a.path, a.heads, a.head_size) for a in found.attention] == [
        (f"transformer.h.{layer}.attn", 4, 8) for layer in (0, 1)
    ]


class TestCodeGen(AdapterSuite):
    text = "codegen"

    def checkpoint(self, folder: Path) -> Path:
        return write(build("CodeGen"), folder)
