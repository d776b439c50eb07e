"""The library by itself: it needs torch, and not qsim-core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys
for name in ("qsim_core", "click", "rich", "pydantic", "pluggy", "transformers"):
    sys.modules[name] = None  # an import of it raises ImportError
"""
PROGRAM = """
import torch
from torch import nn
import qsim_structure as structure

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = self.norm(x)
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))

torch.manual_seed(0)
model, x = Attention().eval(), torch.randn(2, 5, 16)
expected = model(x)

found = structure.trace(model, lambda: model(x))
(group,), (attention,) = found.groups, found.attention
structure.scale_group(model, group, torch.rand(16) + 0.5)
structure.permute_group(model, group, torch.randperm(16))
structure.permute_scores(model, attention, [torch.randperm(8), torch.randperm(8)])

assert (model(x) - expected).abs().max() < 1e-5
print(group.norm, "->", *group.weights)
print(attention.heads, "heads of", attention.head_size, found.refused, found.ordered)
"""


def test_a_model_is_traced_and_folded_without_qsim_core() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED + PROGRAM], capture_output=True, text=True)

    assert run.stdout == "norm -> q.weight k.weight v.weight\n2 heads of 8 [] []\n", run.stderr


def test_the_example_of_the_readme_runs_without_qsim_core() -> None:
    program = (Path(__file__).parent.parent / "README.md").read_text().split("```python\n")[1].partition("```")[0]

    run = subprocess.run([sys.executable, "-c", BLOCKED + program], capture_output=True, text=True)

    assert run.stdout == "0 -> ['1.weight']\n1.weight -> ['3.weight'] True\n", run.stderr


@pytest.mark.parametrize("imported", ["qsim_structure", "qsim_structure.command"])
def test_importing_the_package_or_its_command_imports_no_torch(imported: str) -> None:
    program = f"import sys, {imported}; print('torch' in sys.modules)"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout == "False\n"
