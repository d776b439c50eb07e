"""Stochastic rounding: the generator against its published answers, the rounding against its expectation."""

from __future__ import annotations

from typing import Any

import gfloat
import gfloat.formats
import pytest
import torch
import torch.utils.checkpoint

import qsim_core as qsim
from qsim_core.formats.random_bits import at, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: int, answer: tuple[int, ...]) -> None:
    """The three vectors for philox4x32-10 in Random123's kat_vectors."""
    words = philox(tuple(torch.tensor(word) for word in counter), key)  # type: ignore[arg-type]

    assert tuple(int(word) for word in words) == answer


def test_a_number_depends_on_seed_site_step_and_element_alone() -> None:
    like = torch.empty(3, 7)
    nowhere = uniform(like, 1)
    with at("fc1:input", 2):
        here, other_seed, longer = uniform(like, 1), uniform(like, 2), uniform(torch.empty(50), 1)
    with at("fc1:input", 3):
        other_step = uniform(like, 1)
    with at("fc2:input", 2):
        other_site = uniform(like, 1)

    assert torch.equal(here.flatten(), longer[:21])
    assert all(not (here == other).any() for other in (other_seed, other_step, other_site))
    assert torch.equal(uniform(like, 1), nowhere)


def test_the_threads_and_the_global_seed_do_not_matter() -> None:
    x = torch.linspace(-3, 3, 100_003)
    quantizer = qsim.parse("int4(rounding=stochastic, seed=5)")
    once = quantizer(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        again = quantizer(x)
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(once, again)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("text", ["int8", "e4m3", "e2m1", "block(int8, 64)"])
def test_on_average_stochastic_rounding_changes_nothing(text: str) -> None:
    number = qsim.parse(
        text.replace("int8", "int8(rounding=stochastic)") if "(" in text else f"{text}(rounding=stochastic)"
    )
    x = torch.full((200_000,), 2.3)
    x[::64] = 5.1

    y = number(x)

    values = y[x == x[1]].unique()
    spread = (values.max() - values.min()) / 2 / 200_000**0.5
    assert abs(float(y[x == x[1]].double().mean()) - 2.3) < 4 * spread
    assert len(values) == 2


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_given_the_same_bits_gfloat_rounds_alike(name: str) -> None:
    number = qsim.parse(f"{name}(rounding=stochastic)")
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= number.max]
    x = x[(x == 0) | (x.abs() >= number.max * 2.0**-12)]  # a bfloat16's distance to a value has few bits then
    drawn = (uniform(x, 0) * 2**24).long()
    info = getattr(gfloat.formats, f"format_info_ocp_{name}")

    expected = gfloat.round_ndarray(
        info,
        x.double().numpy(),
        gfloat.RoundMode.StochasticFastest,
        True,
        torch.where(x < 0, drawn, 2**24 - 1 - drawn).numpy(),
        24,
    )

    assert torch.equal(number(x).double(), torch.from_numpy(expected))


def test_what_checkpointing_computes_again_draws_the_same_numbers() -> None:
    model = torch.nn.Linear(16, 1, bias=False)
    model.weight.data = torch.arange(16.0).unsqueeze(0)  # whole numbers, as the scale is 1: the sum has one value
    qsim.simulate(model, activations="int4(rounding=stochastic)")
    x = torch.linspace(-7, 7, 16, requires_grad=True)

    for _ in range(2):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (rounded,) = torch.autograd.grad(y, model.weight)

        assert torch.equal(y, model.weight[0] @ rounded[0].unsqueeze(-1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_sites_that_read_one_tensor_draw_apart_with_a_gradient_and_without(mode: Any) -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
            self.k.weight = self.q.weight = torch.nn.Parameter(torch.eye(64))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q(x), self.k(x)

    model, x = Both(), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    qsim.simulate(model, activations="int4(rounding=stochastic)")

    with mode():
        q, k = model(x)

    assert not torch.equal(q, k)


def test_sites_and_steps_of_a_simulation_draw_apart_and_runs_repeat() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def run() -> list[torch.Tensor]:
        with qsim.simulate(model, activations="int4(rounding=stochastic)"), torch.no_grad():
            return [model(x), model(x)]

    first, second = run(), run()

    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
