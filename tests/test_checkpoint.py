"""A run that died continues at the block that it had reached."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from qsim_cache.fingerprint import sha256
from torch import nn

import qsim_core as qsim
from qsim_core import Run
from qsim_core.transforms.context import Context

PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
import qsim_core as qsim

class Halve(qsim.Transform):
    name = "halve"
    die_at: int = -1

    def __str__(self):
        return "halve"

    def apply(self, model, context):
        for block in context.blocks():
            if block.path == str(self.die_at):
                os.kill(os.getpid(), signal.SIGKILL)
            print(block.path, round(float(block.inputs[0][0][0].sum()), 4))
            block.module.weight.mul_(0.5)
            context.report(block.path, after=0.5)
            for weight in context.weights():
                if weight.name == f"{block.path}.weight":
                    context.pin(weight)

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
simulation = qsim.simulate(model, weights="int4", transforms=[Halve(die_at=int(sys.argv[2]))],
                           calibration=[torch.ones(3, 8)], run=qsim.Run(work_dir=Path(sys.argv[1])))
print([report.layer for report in simulation.reports], sorted(simulation.sites.weights.pinned))
print(model(torch.ones(1, 8)).tolist())
"""


def run(work_dir: Path, die_at: int = -1) -> tuple[int, list[str]]:
    work_dir.with_name("halving.py").write_text(PROGRAM)
    program = f"import sys; sys.path.insert(0, {str(work_dir.parent)!r}); import halving"
    done = subprocess.run([*forked.python(), "-c", program, str(work_dir), str(die_at)], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_after_kill_9_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    _, unbroken = run(tmp_path / "other")

    died, reached = run(tmp_path / "work", die_at=2)
    ended, resumed = run(tmp_path / "work")

    assert (died, ended) == (-9, 0)
    assert len(reached) <= 2  # its last prints may be lost
    assert resumed == unbroken[2:]  # blocks 2 and 3 only, and the same reports, pins and outputs


class Double(qsim.Transform):
    name = "double"

    def apply(self, model: nn.Module, context: Context) -> None:
        for block in context.blocks():
            next(block.module.parameters()).mul_(2)
            context.report(block.path)


class Scaled(nn.Linear):
    """A linear layer whose code reads an attribute."""

    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def simulate(work_dir: Path, seed: int = 0, scale: float | None = None, **recipe: Any) -> qsim.Simulation:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(4, 4), Scaled(4, 4))
    if scale is not None:
        model[0].scale = scale
    run = Run(work_dir=work_dir, seed=seed)
    return qsim.simulate(model, transforms=[Double()], calibration=[torch.ones(2, 4)], run=run, **recipe)


@pytest.mark.parametrize("other", [{"seed": 1}, {"scale": 2.0}, {"weights": "int8"}], ids=str)
def test_what_decides_a_block_starts_anew(other: dict[str, Any], tmp_path: Path) -> None:
    for values in ({}, other, {}):
        simulate(tmp_path, **{"weights": "int4", **values})

    assert len(list(tmp_path.glob("*/block-000.pt"))) == 2


def test_of_a_transform_that_was_typed_in_no_block_is_kept(tmp_path: Path) -> None:
    done = subprocess.run(
        [*forked.python(), "-c", PROGRAM, str(tmp_path), "-1"], capture_output=True, text=True, check=True
    )

    assert "no blocks are kept for later runs: the code of __main__ is not in a file" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_block_is_computed_again(tmp_path: Path) -> None:
    whole = simulate(tmp_path, weights="int4")
    (file,) = tmp_path.glob("*/block-001.pt")
    content = bytearray(file.read_bytes())
    content[content.index(whole.model[1].weight.detach().numpy().tobytes()) + 3] ^= 0x40
    for damaged in (bytes(content), b"no tensors", b""):
        file.write_bytes(damaged)

        again = simulate(tmp_path, weights="int4")

        assert torch.equal(again.model[1].weight, whole.model[1].weight)


def test_a_work_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")

    with pytest.raises(qsim.QsimError, match=r"cannot use .*file as work directory: "):
        simulate(file, weights="int4")


def test_the_digest_of_a_tensor_is_of_its_values_wherever_they_lie() -> None:
    numbers = torch.arange(6.0)

    assert sha256([numbers[2::2]]) == sha256([torch.tensor([2.0, 4.0])])
    assert sha256([numbers[2::2][:1]]) == sha256([torch.tensor([2.0])])  # one element, stride 2
    assert sha256([numbers[2:3]]) != sha256([numbers[2]])
