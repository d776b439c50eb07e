"""Time on a roofline: by hand, format by format, and against the figures of LLM-Viewer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qsim_core as qsim

CHIP = "roofline([[int8, 2e12], [bf16, 1e12]], bandwidth=1e9, float32=1e11)"


def cost(text: str, model: nn.Module, x: torch.Tensor, **recipe: str) -> qsim.Cost:
    work = qsim.simulate(model, **recipe).work(x)  # type: ignore[arg-type]
    found: qsim.Cost = qsim.parse(text).cost(work)
    return found


def layer(rows: int = 64, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        return nn.Linear(256, 128, bias=False, dtype=dtype), torch.empty(rows, 256, dtype=dtype)


def test_a_product_bound_by_memory_takes_the_time_of_its_bytes() -> None:
    found = cost(CHIP, *layer(), weights="channel(int8)", activations="token(int8)")

    bits = 64 * (256 * 8 + 32) + 128 * (256 * 8 + 32) + 64 * 128 * 16  # a scale for each row, the result in bfloat16
    assert found.totals["seconds"] == found.totals["seconds_bound_by_memory"] == pytest.approx(bits / 8 / 1e9)
    assert [site["bound"] for site in found.sites.values()] == ["memory"]


def test_a_product_bound_by_compute_takes_the_time_of_its_operations() -> None:
    found = cost(CHIP.replace("1e9", "1e15"), *layer(), weights="int8", activations="int8")

    assert found.totals["seconds_bound_by_compute"] == pytest.approx(2 * 64 * 256 * 128 / 2e12)
    assert found.totals["seconds_bound_by_memory"] == 0


def test_efficiency_is_a_share_of_the_peak() -> None:
    whole, half = (
        cost(f"roofline([[bf16, 1e12]], bandwidth=1e15, efficiency={share})", *layer()).totals["seconds"]
        for share in (1.0, 0.5)
    )

    assert half == 2 * whole


@pytest.mark.parametrize(
    ("weights", "activations", "unit"),
    [
        ("int4", "int4", "int8"),
        ("int4", "int8", "int8"),
        ("int8", "int16", "float32"),
        ("int8", "none", "bf16"),
        ("e4m3", "e4m3", "bf16"),
        ("channel(uint4)", "int8", "int8"),
        ("token(int8, symmetric=false)", "int8", "int8"),
        ("nf4", "none", "float32"),
    ],
)
def test_a_product_runs_in_the_narrowest_format_that_holds_both_operands(
    weights: str, activations: str, unit: str
) -> None:
    found = cost(CHIP, *layer(), weights=weights, activations=activations)

    (site,) = found.sites.values()
    assert site["unit"] == unit


def test_the_result_says_what_a_missing_format_runs_in() -> None:
    found = cost(CHIP, *layer(), weights="e4m3", activations="e4m3")

    assert "e4m3 by e4m3 runs in bf16" in found.assumptions


def test_a_format_of_its_own_is_not_noted() -> None:
    found = cost(CHIP, *layer(), weights="int4", activations="int8")

    assert not any("runs in" in line for line in found.assumptions)


def test_a_device_that_holds_the_values_in_no_format_says_so() -> None:
    found = cost("tpu_v5e", *layer(dtype=torch.float32))

    assert found.assumptions[-1] == "float32 by float32 runs in bf16, which does not hold all of their values"


def test_weights_travel_in_their_own_bits_whatever_they_run_in() -> None:
    narrow, wide = (
        cost(CHIP, *layer(rows=1), weights=weights).totals["seconds"] for weights in ("cast(int2)", "cast(int8)")
    )

    assert wide - narrow == pytest.approx(256 * 128 * 6 / 8 / 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roofline([[int8, 0]], bandwidth=1)", "flops.0.1 should be greater than 0, not 0"),
        ("roofline([[int99, 1]], bandwidth=1)", "no format 'int99'"),
        ("roofline([], bandwidth=1)", "flops: Tuple should have at least 1 item"),
        ("roofline([[int8, 1], [int8, 2]], bandwidth=1)", "flops has two rates for int8"),
        ("roofline([[int8, 1]], bandwidth=inf)", "bandwidth should be a finite number"),
        ("energy(dram=nan)", "dram should be a finite number"),
        ("roofline([[int8, 1]])", "bandwidth is missing"),
        ("h100(efficiency=1.5)", "efficiency should be less than or equal to 1, not 1.5"),
    ],
)
def test_a_device_that_cannot_be_is_one_line(text: str, message: str) -> None:
    with pytest.raises(qsim.QsimError) as error:
        qsim.parse(text)

    assert message in str(error.value) and "\n" not in str(error.value)


class Decoder(nn.Module):
    """The products of a layer of Llama-2-7B: a projection, one of the MLP, and attention with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4096, 4096, bias=False)
        self.gate_proj = nn.Linear(4096, 11008, bias=False)

    def forward(self, x: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (32, 128)).transpose(1, 2)
        attended = (q @ cached.transpose(-1, -2)).softmax(-1) @ cached
        return self.gate_proj(attended.transpose(1, 2).flatten(2))


VIEWER = {
    ("prefill", "q_proj"): (69e9, 67e6, 155e12, "compute"),
    ("prefill", "gate_proj"): (185e9, 152e6, 155e12, "compute"),
    ("prefill", ":matmul.0"): (34e9, 302e6, 87e12, "memory"),
    ("prefill", ":matmul.1"): (34e9, 302e6, 87e12, "memory"),
    ("decode", "q_proj"): (34e6, 34e6, 768e9, "memory"),
    ("decode", "gate_proj"): (90e6, 90e6, 768e9, "memory"),
    ("decode", ":matmul.0"): (17e6, 17e6, 762e9, "memory"),
    ("decode", ":matmul.1"): (17e6, 17e6, 762e9, "memory"),
}
"""Operations, bytes, operations a second and bound of Llama-2-7B on an A6000, one sequence of 2048 tokens in FP16.

Source: LLM-Viewer (arXiv 2402.16363), by the formulas of its model_analyzer.py, to two digits.
"""


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_layer_of_llama_2_7b_on_an_a6000_is_as_llm_viewer_has_it(phase: str) -> None:
    with torch.device("meta"):
        model = Decoder().half()
        tokens = torch.empty(1, 2048 if phase == "prefill" else 1, 4096, dtype=torch.float16)
        cached = torch.empty(1, 32, 2048, 128, dtype=torch.float16)

    found = qsim.parse("a6000").cost(qsim.simulate(model).work((tokens, cached))).sites

    for (of, site), (flops, size, rate, bound) in VIEWER.items():
        if of == phase:
            numbers = found[site]
            told = numbers["flops"], numbers["bytes"], numbers["flops"] / numbers["seconds"]
            assert told == pytest.approx((flops, size, rate), rel=0.02)
            assert numbers["bound"] == bound
