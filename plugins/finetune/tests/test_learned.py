"""Learned step sizes: LSQ's gradients, the parameters that hold the steps, and their training."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from qsim_finetune.learned_steps import LearnedScheme
from torch import Tensor, nn

import qsim_core as qsim


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def learning(model: nn.Module, example: Any, **changes: Any) -> qsim.Simulation:
    texts = {"weights": "channel(int4, gradient=lsq)", "activations": "tensor(int8, gradient=lsq)", **changes}
    return qsim.simulate(model, **texts, example=example)


def steps(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "qsim_steps" in name}


def test_the_gradients_are_those_of_equations_3_and_5() -> None:
    step = nn.Parameter(torch.tensor([[0.5]]))
    x = torch.tensor([0.2, 1.3, 9.0, -9.0], requires_grad=True)

    LearnedScheme(qsim.parse("tensor(int4, gradient=lsq)"), step, None, "here", of_weight=True)(x).backward(
        torch.tensor([1.0, 2.0, 3.0, 4.0])
    )

    by_hand = 1 * (0 - 0.4) + 2 * (3 - 2.6) + 3 * 7 + 4 * -7
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 0.0, 0.0]))  # type: ignore[arg-type]
    assert step.grad.item() == pytest.approx(by_hand / math.sqrt(4 * 7), rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "of_weight", "share"),
    [
        ("tensor(int4, gradient=lsq)", True, 6 * 20),
        ("tensor(int4, gradient=lsq)", False, 20),
        ("channel(int4, gradient=lsq)", True, 20),
        ("channel(int4, symmetric=false, gradient=lsq)", True, 20),
        ("block(int4, 8, gradient=lsq)", True, 20 / 3),
        ("block(int4, 8, gradient=lsq)", False, 8),
        ("block(int4, [2, 5], gradient=lsq)", True, 10),
        ("block(e2m1, 8, gradient=lsq)", True, 20 / 3),
    ],
)
def test_a_steps_gradient_is_the_slope_of_the_surrogate_with_its_rounding_held(
    text: str, of_weight: bool, share: float
) -> None:
    """The surrogate: step * (clamp(x / step) + r), where r is the change by rounding at the given step."""
    x, scheme = noise(6, 20).double(), qsim.parse(text)
    start = {"tensor": (1, 1), "channel": (6, 1, 1), 8: (6, 3, 1) if of_weight else (3, 1), (2, 5): (3, 4, 1)}
    torch.manual_seed(0)
    step = nn.Parameter(0.1 + 0.2 * torch.rand(start[scheme.granularity], dtype=torch.float64))
    zero = torch.full_like(step.detach(), -2.0) if not scheme.symmetric else None
    quantizer, upstream = LearnedScheme(scheme, step, zero, "here", of_weight), noise(6, 20, seed=1).double()
    low, high = (bound - (0 if zero is None else -2.0) for bound in (scheme.coded.min, scheme.coded.max))
    blocks = scheme.split(x)
    held = scheme.split(quantizer.quantize(x)) / step - (blocks / step).clamp(low, high)

    def surrogate(at: Tensor) -> Tensor:
        return scheme.join(at * ((blocks / at).clamp(low, high) + held.detach()), x)

    quantizer(x).backward(upstream)

    assert step.grad is not None
    for index in range(step.numel()):
        h = torch.zeros(step.numel(), dtype=torch.float64)
        h[index] = 1e-7
        up, down = (surrogate(step.detach() + sign * h.view_as(step)) for sign in (1, -1))
        slope = ((up - down) * upstream).sum() / 2e-7
        expected = float(slope) / math.sqrt(share * scheme.coded.max)
        assert step.grad.flatten()[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_steps_are_parameters_and_not_in_the_state() -> None:
    model = mlp()
    before = list(model.state_dict())

    learning(model, noise(5, 16))

    assert list(model.state_dict()) == before
    assert {name: tuple(p.shape) for name, p in steps(model).items()} == {
        "0.qsim_steps.weight:weight": (8, 1, 1),
        "0.qsim_steps.weight:input": (1, 1),
        "2.qsim_steps.weight:weight": (4, 1, 1),
        "2.qsim_steps.weight:input": (1, 1),
    }
    model.load_state_dict(model.state_dict())


def test_they_start_where_the_range_finds_them_and_change_nothing_at_first() -> None:
    learned, found, x = mlp(), mlp(), noise(5, 16)

    learning(learned, x, activations="tensor(int8, range=mse, gradient=lsq)")
    qsim.simulate(found, weights="int4", activations="tensor(int8, range=mse, static=true)", calibration=[x])

    assert torch.equal(learned(x), found(x))


def test_restoring_takes_them_away() -> None:
    model, x = mlp(), noise(5, 16)
    exact = model(x)

    learning(model, x).restore()

    assert steps(model) == {}
    assert torch.equal(model(x), exact)


def test_any_optimizer_trains_them_and_the_loss_falls() -> None:
    model, x = mlp(), noise(64, 16)
    y = F.relu(x[:, :4])
    learning(model, x)
    start = {name: step.detach().clone() for name, step in steps(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0] / 3
    assert all(not torch.equal(step, start[name]) for name, step in steps(model).items())


def test_frozen_weights_leave_the_steps_to_train_and_an_evaluation_sees_them() -> None:
    model, x = mlp(), noise(64, 16)
    learning(model, x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("qsim_steps" in name)
    model.eval()
    with torch.no_grad():
        before = model(x)  # the quantized weights are kept from here on

    model(x).square().sum().backward()
    torch.optim.SGD(steps(model).values(), lr=1e-3).step()

    with torch.no_grad():
        after = model(x)
    weight = qsim.parse("channel(int4)")
    moved = steps(model)["0.qsim_steps.weight:weight"].detach()
    assert not torch.equal(before, after)
    assert not torch.equal(weight.quantize_at(model[0].weight, moved, None), weight(model[0].weight))


def test_a_copied_model_trains_its_own_steps() -> None:
    model, x = mlp(), noise(5, 16)
    learning(model, x)
    twin = copy.deepcopy(model)

    twin(x).sum().backward()

    assert all(step.grad is not None for step in steps(twin).values())
    assert all(step.grad is None for step in steps(model).values())


def test_a_pickled_model_holds_its_steps() -> None:
    model, x, file = mlp(), noise(5, 16), io.BytesIO()
    learning(model, x)
    torch.save(model, file)
    file.seek(0)

    again = torch.load(file, weights_only=False)

    assert list(steps(again)) == list(steps(model))
    assert torch.equal(again(x), model(x))


def test_a_step_below_zero_counts_by_its_magnitude() -> None:
    x, grads = noise(4, 8), []
    for sign in (1.0, -1.0):
        step = nn.Parameter(torch.tensor([[0.3 * sign]]))
        learned = LearnedScheme(qsim.parse("tensor(int4, gradient=lsq)"), step, None, "here")
        learned(x).square().sum().backward()
        grads.append(step.grad)

    assert torch.equal(grads[0], -grads[1])  # type: ignore[operator]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_steps_the_same_gradient(reentrant: bool) -> None:
    ids = families.tokens()

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = families.make("opt").train()
        learning(model, {"input_ids": ids, "use_cache": False}, activations="abfp(int8, n=8, gradient=lsq)")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)

    assert sum("matmul" in name for name in plain) == 2 * 2 * 2
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_autocast_computes_in_bfloat16_and_the_steps_stay_float32() -> None:
    model, x = mlp(), noise(64, 16)
    learning(model, x)

    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()

    assert y.dtype == torch.bfloat16
    assert {step.grad.dtype for step in steps(model).values() if step.grad is not None} == {torch.float32}
    assert all(step.grad is not None and step.grad.abs().sum() > 0 for step in steps(model).values())


def test_a_step_for_each_token_is_refused() -> None:
    with pytest.raises(
        qsim.SpecError,
        match=r"^token: gradient=lsq cannot learn a scale for each token; it learns one for the tensor or",
    ):
        qsim.parse("token(int4, gradient=lsq)")


def test_activations_have_no_channels_to_learn_scales_for() -> None:
    model = mlp()

    with pytest.raises(qsim.RecipeError) as error:
        learning(model, noise(5, 16), activations="channel(int8, gradient=lsq)")

    assert str(error.value) == (
        "0 (input): channel(int8, gradient=lsq) learns a scale for the tensor or for n along the row, not for channel"
    )
    assert steps(model) == {}


def test_without_an_example_nothing_says_where_they_start() -> None:
    model = mlp()
    qsim.simulate(model, weights="channel(int4, gradient=lsq)")

    with pytest.raises(
        qsim.RecipeError, match=r"^0: channel\(int4, gradient=lsq\) has no scale, as no calibration data"
    ):
        model(noise(5, 16))
