"""WUSH against its formula, one block at a time, and for what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from families import make, tokens
from qsim_hadamard import hadamard
from qsim_hadamard.wush import transform
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

BATCHES = [{"input_ids": tokens(seed)} for seed in range(4)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(moments: Tensor, weight: Tensor, damping: float, eigen_damping: float) -> Tensor:
    """A [n, n] of one block, as the paper has it: by a singular value decomposition, with V's signs as here."""
    n, rows = len(moments), len(weight)
    u = torch.linalg.cholesky(moments + damping * moments.trace() / n * torch.eye(n).double()).T
    v, values, _ = torch.linalg.svd(u @ weight.T)
    s = values / math.sqrt(rows)
    s = s + eigen_damping * sum(s) / n
    for column in v.T:
        column *= column[column.abs().argmax()].sign()
    return hadamard(n) / math.sqrt(n) @ torch.diag(s.sqrt()) @ v.T @ torch.linalg.inv(u.T)


def test_the_matrix_of_two_channels_by_hand() -> None:
    """E[x xᵀ] = I and W = diag(3, 1): U = V = I, s = (3, 1) / √2, A = H diag(√s) / √2."""
    weight = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))

    matrices, _ = transform(torch.eye(2).double()[None], weight.T[None], damping=0, eigen_damping=0)

    expected = torch.tensor([[1.02988357, 0.59460356], [1.02988357, -0.59460356]], dtype=torch.float64)
    assert torch.allclose(matrices[0], expected, atol=1e-8)


@pytest.mark.parametrize("dampings", [(0.01, 0.01), (0.1, 0.0)])
def test_each_block_has_the_papers_matrix(dampings: tuple[float, float]) -> None:
    x, weight = noise(100, 3, 8) * torch.arange(1, 9), noise(20, 3, 8, seed=1)
    moments = torch.stack([x[:, b].T @ x[:, b] / 100 for b in range(3)])

    matrices, inverses = transform(moments, weight.movedim(0, -1), *dampings)

    for block in range(3):
        expected = reference(moments[block], weight[:, block], *dampings)
        assert torch.allclose(matrices[block], expected, atol=1e-9 * float(expected.abs().max()))
        assert torch.allclose(matrices[block] @ inverses[block], torch.eye(8).double(), atol=1e-9)


def test_all_channels_of_a_block_have_one_variance() -> None:
    x = noise(200, 8) @ noise(8, 8, seed=1)
    moments = x.T @ x / 200

    (matrix,), _ = transform(moments[None], noise(16, 8, seed=2).T[None], damping=0, eigen_damping=0.01)

    variances = (matrix @ moments @ matrix.T).diagonal()
    assert torch.allclose(variances, variances.mean().expand(8))


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "gpt2", "codegen"])
def test_the_function_stays(family: str) -> None:
    exact = make(family).double()(**BATCHES[0]).logits
    model = make(family).double()

    simulation = qsim.simulate(model, weights=wide, activations=wide, transforms=["wush(8)"], calibration=BATCHES)

    assert len([report for report in simulation.reports if report.after is not None]) >= 8
    assert (model(**BATCHES[0]).logits - exact).abs().max() < 1e-5 * exact.abs().max()


def wide(x: Tensor) -> Tensor:
    """A quantizer that changes nothing."""
    return x.clone()


def test_it_loses_less_than_a_rotation_where_channels_differ() -> None:
    x = noise(256, 64).float() * torch.logspace(-1, 1, 64)
    recipe = {"weights": "block(int4, 16)", "activations": "block(int4, 16)"}

    def error(transform: str) -> float:
        torch.manual_seed(0)
        model = nn.Linear(64, 32)
        exact = model(x)
        qsim.simulate(model, recipe | {"transforms": [transform]}, calibration=[x])
        return (model(x) - exact).norm().item()  # type: ignore[no-any-return]

    assert error("wush") < 0.9 * error("hadamard(size=block)")


def test_a_block_without_inputs_is_mapped_too() -> None:
    x = torch.ones(4, 8)
    x[:, 4:] = 0
    model = nn.Linear(8, 2)
    exact = model(x + 1)

    qsim.simulate(model, weights=wide, activations=wide, transforms=["wush(4)"], calibration=[x])

    assert torch.allclose(model(x + 1), exact, atol=1e-5)


def test_too_few_samples_without_damping_are_an_error() -> None:
    with pytest.raises(qsim.RecipeError, match="the inputs of a block of 4 span fewer directions"):
        qsim.simulate(
            nn.Sequential(nn.Linear(8, 2)), weights="block(int4, 4)", transforms=["wush(damping=0)"],
            calibration=[noise(3, 8).float()],
        )  # fmt: skip


def test_after_a_rotation_it_is_refused() -> None:
    message = r"^wush\(4\) changed nothing in this model: left alone: its input is rotated already"
    with pytest.raises(qsim.RecipeError, match=message):
        transforms = ["hadamard(size=4)", "wush(4)"]
        qsim.simulate(nn.Linear(8, 2), weights="int4", transforms=transforms, calibration=[torch.ones(2, 8)])


def test_without_blocks_it_asks_for_a_size() -> None:
    message = r"left alone: channel\(int4\) has no blocks along the rows; say a size"
    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(nn.Linear(8, 2), weights="int4", transforms=["wush"], calibration=[torch.ones(2, 8)])


class TestWush(TransformSuite):
    text = ("wush(4)", "wush(whole, damping=0.1)")
