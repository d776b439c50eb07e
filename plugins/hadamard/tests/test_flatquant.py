"""FlatQuant: its map against the Kronecker product, its learning against the same steps written out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import make, tokens
from qsim_hadamard.maps import Kronecker
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

BATCHES = [{"input_ids": tokens(seed)} for seed in range(3)]
FOUR_BITS = {"weights": "channel(int4)", "activations": "token(int4)"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def simulate(model: nn.Module, transform: str, data: Any, **more: Any) -> qsim.Simulation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)  # few steps on a random model may learn nothing
        return qsim.simulate(model, FOUR_BITS | {"transforms": [transform]} | more, calibration=data)


def test_the_map_is_a_kronecker_product() -> None:
    left, right, scales, x, weight = noise(2, 2), noise(3, 3, seed=1), noise(6, seed=2), noise(5, 6), noise(4, 6)

    found = Kronecker(left, right, scales)

    whole = torch.diag(scales) @ torch.kron(left, right)
    assert torch.allclose(found(x), x @ whole)
    assert torch.allclose(found.of_weight(weight), weight @ torch.linalg.inv(whole).T)


def test_the_map_by_hand() -> None:
    """[1, 2, 3, 4] is [[1, 2], [3, 4]]; L swaps its rows, R doubles the second column."""
    left, right = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()

    found = Kronecker(left, right, torch.ones(4).double())

    assert found(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [3.0, 8.0, 1.0, 4.0]


def straight_through(x: Tensor) -> Tensor:
    scale = x.detach().abs().amax(-1, keepdim=True) / 7
    return x + ((x / scale).round() * scale - x).detach()


def test_learning_is_the_steps_written_out() -> None:
    weight, x = noise(24, 16), noise(200, 4, seed=1) @ noise(4, 16, seed=2) + 0.1 * noise(200, 16, seed=3)
    model = nn.Linear(16, 24, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    signs = torch.randint(0, 2, (4,), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).double()
    first = torch.kron(pair, pair) * signs[:, None] / 2
    scales = weight.abs().amax(0) ** 0.7 / x.abs().amax(0) ** 0.3
    learned = [matrix.clone().requires_grad_() for matrix in (first, first, scales)]
    optimizer = torch.optim.AdamW(learned, lr=0.003)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.003 * (1e-3 + 0.999 * 0.5 * (1 + torch.tensor(torch.pi * step / 10).cos()))
        whole = torch.diag(learned[2]) @ torch.kron(learned[0], learned[1])
        found = straight_through(x @ whole) @ straight_through(weight @ torch.linalg.inv(whole).T).T
        optimizer.zero_grad()
        (found - x @ weight.T).square().mean().backward()
        optimizer.step()

    simulation = simulate(model, "flatquant(10, lr=0.003)", [x])

    turn: Any = simulation.sites.table["weight"].rotations["input"]
    for one, expected in zip((turn.left, turn.right, turn.scales), learned, strict=True):
        assert torch.allclose(one, expected.detach(), atol=1e-6)
    assert simulation.reports[0].after < simulation.reports[0].before


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_the_function_stays(family: str) -> None:
    exact, model = make(family).double()(**BATCHES[0]).logits, make(family).double()

    simulation = simulate(model, "flatquant(3)", BATCHES)
    simulation.sites.quantizing = False

    assert (model(**BATCHES[0]).logits - exact).abs().max() < 1e-5 * exact.abs().max()


def test_weights_with_one_input_share_their_map() -> None:
    table = simulate(make("llama"), "flatquant(1)", BATCHES).sites.table

    turns = [table[f"model.layers.0.self_attn.{name}_proj"].rotations["input"] for name in "qkvo"]
    assert turns[0] is turns[1] is turns[2] is not turns[3]


def test_static_scales_are_refused() -> None:
    with pytest.raises(qsim.RecipeError, match=r"^flatquant\(100\) learns under dynamic scales, and .* use hadamard$"):
        simulate(make("opt"), "flatquant", BATCHES, activations="tensor(int8, static=true)")


@pytest.mark.filterwarnings("ignore:.*has learned nothing")
def test_a_resumed_run_computes_the_same(tmp_path: Any) -> None:
    """Maps stand at sites, where a later run would not find them: no block is kept."""
    pytest.importorskip("qsim_cache")
    first, again = make("llama"), make("llama")

    for model in (first, again):
        recipe = FOUR_BITS | {"transforms": ["flatquant(2)"]}
        qsim.simulate(model, recipe, calibration=BATCHES, run=qsim.Run(work_dir=tmp_path))

    assert torch.equal(first(**BATCHES[0]).logits, again(**BATCHES[0]).logits)


class TestFlatQuant(TransformSuite):
    text = ("flatquant(2)", "flatquant(2, alpha=none)")
