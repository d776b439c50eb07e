"""Rotations are Hadamard's, and they change numbers and nothing else."""

from __future__ import annotations

import pytest
import torch
from families import make, tokens
from qsim_hadamard import Rotation, hadamard, signs
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

IDS = tokens()


@pytest.mark.parametrize("size", [1, 2, 4, 64, 12, 20, 28, 36, 44, 60])
def test_a_hadamard_matrix_has_orthogonal_rows_of_signs(size: int) -> None:
    matrix = hadamard(size)

    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 48, 96, 80, 160, 768, 3072, 11008, 14336, 5120])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_rotation_is_orthogonal_and_flat(size: int, seed: int | None) -> None:
    rotation, places = Rotation(size, seed), torch.tensor([0, size // 2, size - 1])
    rows = torch.nn.functional.one_hot(places, size).double()

    rotated = rotation(rows)

    assert torch.allclose(rotated @ rotated.T, rows @ rows.T, atol=1e-12)
    assert torch.allclose(rotated.abs(), torch.full_like(rotated, size**-0.5), atol=1e-12)


def test_a_rotation_by_blocks_by_hand() -> None:
    rotated = Rotation(4, None, 2)(torch.tensor([1.0, 3.0, 5.0, 9.0], dtype=torch.float64))

    assert torch.allclose(rotated * 2**0.5, torch.tensor([4.0, -2.0, 14.0, -4.0], dtype=torch.float64))


@pytest.mark.parametrize(("size", "block"), [(64, 16), (48, 12), (96, 24), (60, 20), (48, 2)])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_rotation_by_blocks_is_one_matrix_for_each_block(size: int, block: int, seed: int | None) -> None:
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signed = x if seed is None else x * signs(size, seed)
    one = Rotation(block, None)(torch.eye(block, dtype=torch.float64))

    parts = [signed[:, start : start + block] @ one for start in range(0, size, block)]

    assert torch.allclose(Rotation(size, seed, block)(x), torch.cat(parts, -1), atol=1e-12)


def test_an_outlier_stays_in_its_block() -> None:
    x = torch.ones(64)
    rotation, outlier = Rotation(64, 0, 16), x.clone()
    outlier[5] = 1000

    changed = rotation(x) != rotation(outlier)

    assert changed[:16].all()
    assert not changed[16:].any()


@pytest.mark.parametrize("size", [3, 6, 77, 92])
def test_a_size_without_a_matrix_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of {size} is known here"):
        Rotation(size)(torch.ones(size))


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "gpt2", "codegen"])
def test_the_function_stays(family: str) -> None:
    exact = make(family).double()(input_ids=IDS).logits
    model = make(family).double()

    simulation = qsim.simulate(
        model, weights=wide, activations=wide, transforms=["hadamard"], example={"input_ids": IDS}
    )

    rotated = [r.layer for r in simulation.reports if r.after is not None]
    assert len(rotated) >= 8
    assert (model(input_ids=IDS).logits - exact).abs().max() < 1e-5 * exact.abs().max()  # rotary tables are float32


def wide(x: Tensor) -> Tensor:
    """A quantizer that changes nothing."""
    return x.clone()


@pytest.mark.parametrize(("family", "folded"), [("opt", 2), ("opt-350m", 2), ("llama", 2), ("gpt2", 2), ("codegen", 0)])
def test_the_function_stays_where_rotations_are_folded_into_v(family: str, folded: int) -> None:
    """Two layers each; codegen's v lies in one weight with q and k, which tracing does not follow."""
    exact = make(family).double()(input_ids=IDS).logits
    model = make(family).double()

    simulation = qsim.simulate(
        model, weights=wide, activations=wide, transforms=["hadamard(size=8)"], example={"input_ids": IDS}
    )

    assert (model(input_ids=IDS).logits - exact).abs().max() < 1e-5 * exact.abs().max()
    assert len([report for report in simulation.reports if "folded into" in report.note]) == folded


def test_a_rotation_that_is_folded_into_v_needs_nothing_in_the_forward() -> None:
    simulation = qsim.simulate(
        make("llama"), weights="int4", transforms=["hadamard(size=16)"], example={"input_ids": IDS}
    )

    sites = {site.site: site.notes for site in simulation.audit().sites}
    assert sites["model.layers.0.self_attn.o_proj"] == []
    assert sites["model.layers.0.self_attn.v_proj"] == ["its input is rotated by Hadamard matrices of 16"]


def test_the_size_of_a_block_is_that_of_the_formats() -> None:
    """The largest size of which both blocks are multiples."""
    model = nn.Linear(96, 4)
    recipe = {"weights": "block(int4, 32)", "activations": "block(int8, 48)", "transforms": ["hadamard(size=block)"]}

    (site,) = qsim.simulate(model, recipe, example=torch.ones(1, 96)).audit().sites

    assert site.notes == ["its input is rotated by Hadamard matrices of 16"]


def test_a_size_that_does_not_divide_the_inputs_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 4))
    message = (
        r"^hadamard\(0, size=32\): 32 does not divide the 48 inputs of 1\.weight; choose a size that divides 16, as all "
        r"inputs are multiples of it, or leave the layer out by skip$"
    )

    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(model, weights="int4", transforms=["hadamard(size=32)"], example=torch.ones(1, 32))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("int4", r"channel\(int4\) has no blocks along the rows; say a size"),
        ("block(int4, 32)", "its formats' blocks of 32 do not divide its 48 inputs"),
        ("block(int4, 6)", "no Hadamard matrix of 6 is known here"),
    ],
)
def test_formats_without_a_fitting_block_are_refused(weights: str, reason: str) -> None:
    with pytest.raises(qsim.RecipeError, match=rf"changed nothing in this model: left alone: {reason}"):
        qsim.simulate(nn.Linear(48, 4), weights=weights, transforms=["hadamard(size=block)"], example=torch.ones(1, 48))


def test_formats_without_scales_are_named_beside_the_result() -> None:
    message = r"^0\.weight \(and 1 more\) has no scales: under cast\(bf16\) only values out of range gain$"
    with pytest.warns(qsim.CalibrationWarning, match=message):
        qsim.simulate(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),
            weights="cast(bf16)",
            activations="cast(bf16)",
            transforms=["hadamard"],
            example=torch.ones(1, 8),
        )


def test_a_size_is_a_word_or_a_number_from_two_on() -> None:
    with pytest.raises(qsim.QsimError, match=r"a size is whole, block, or a whole number from 2 on, not 1"):
        qsim.parse("hadamard(size=1)")


def test_outliers_cost_less() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 20

    def error(*transforms: str) -> float:
        model = make("llama").model.layers[0].mlp.gate_proj
        exact = model(x)
        qsim.simulate(model, activations="int4", transforms=transforms or None, example=x)
        return (model(x) - exact).norm().item()  # type: ignore[no-any-return]

    assert error("hadamard") < 0.5 * error()


def test_restore_takes_rotations_away() -> None:
    model = make("opt")
    before = model(input_ids=IDS).logits
    simulation = qsim.simulate(model, weights="int4", transforms=["hadamard"], example={"input_ids": IDS})

    simulation.restore()

    assert torch.equal(model(input_ids=IDS).logits, before)


def test_what_cannot_be_rotated_is_reported() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 6), nn.Linear(6, 2))

    simulation = qsim.simulate(model, weights="int4", transforms=["hadamard"], example=torch.ones(1, 2, 8))

    assert {report.layer: report.note for report in simulation.reports} == {
        "0.weight": "left alone: a convolution",
        "2.weight": "",
        "3.weight": "left alone: no Hadamard matrix of 6 is known here",
    }


def test_where_nothing_can_be_rotated_nothing_is_changed() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv1d(8, 4, 1))
    nn.init.uniform_(model[0].weight, 0.1, 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(
        qsim.RecipeError, match=r"^hadamard\(0\) changed nothing in this model: left alone: a convolution;"
    ):
        qsim.simulate(model, weights="int4", transforms=["hadamard"], example=torch.ones(1, 8, 5), keep=False)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_a_sum_reads_too_is_left_alone() -> None:
    class Summed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.sum(1)

    model = nn.Sequential(Summed(8, 8), nn.Linear(8, 4))

    simulation = qsim.simulate(model, weights="int4", transforms=["hadamard"], example=torch.ones(1, 8))

    assert [report.note for report in simulation.reports] == ["left alone: it is tied, or used in two ways", ""]


def test_a_tied_weight_is_left_alone() -> None:
    simulation = qsim.simulate(make("opt"), weights="int4", transforms=["hadamard"], example={"input_ids": IDS})

    notes = {report.layer: report.note for report in simulation.reports}
    assert notes["lm_head.weight"] == "left alone: it is tied, or used in two ways"


def test_the_audit_says_what_is_rotated() -> None:
    model = nn.Linear(16, 4)
    simulation = qsim.simulate(model, activations="int4", transforms=["hadamard"], example=torch.ones(1, 16))

    (site,) = simulation.audit().sites

    assert site.notes == ["its input is rotated by a Hadamard matrix of 16"]


@pytest.mark.parametrize("late", ["smoothquant", "rptq"])
def test_what_cannot_fold_through_a_rotation_has_to_come_first(late: str) -> None:
    message = rf"^{late}\(.*\) changed nothing .*an earlier transform rotates inputs or splits weights, .*: put {late}\(.*\) first"
    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(
            make("llama"),
            weights="int4",
            activations="int4",
            transforms=["hadamard(size=8)", late],
            calibration=[{"input_ids": IDS}],
        )


class TestHadamard(TransformSuite):
    text = ("hadamard", "hadamard(seed=3, attention=false)", "hadamard(size=4)")
