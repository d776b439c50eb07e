"""The suite of hook `qsim_calibrators`: which range a scale covers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qsim_core.components.component import Component
from qsim_core.quantizers.calibrators import Calibrator
from qsim_core.simulation.simulation import simulate
from qsim_core.testing.component import ComponentSuite, global_randomness_untouched, identical, noise
from qsim_core.testing.model import scaled

DTYPES = [torch.float32, torch.float64]


def error_of(blocks: Tensor) -> Any:
    """The change of values by rounding to 15 levels under a range (lowest, highest), [..., B, n]."""

    def error(lowest: Tensor, highest: Tensor) -> Tensor:
        largest = torch.maximum(-lowest, highest).unsqueeze(-1)
        step = torch.where(largest > 0, largest / 7, 1.0)
        return (blocks / step).round().clamp(-7, 7) * step - blocks

    return error


class CalibratorSuite(ComponentSuite):
    """`range(blocks, error, counts)` gives a lowest and a highest value for each block."""

    base: ClassVar[type[Component]] = Calibrator

    def ends(self, calibrator: Any, blocks: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The range of blocks [..., B, n]."""
        low, high = calibrator.range(blocks, error_of(blocks), counts)
        return low, high

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    @pytest.mark.parametrize("shape", [(1, 200), (5, 16), (2, 3, 16)], ids=str)
    def test_each_block_has_a_lowest_and_a_highest(
        self, component: Any, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        blocks = noise(*shape, dtype=dtype)
        before = blocks.clone()

        for end in (ends := self.ends(component, blocks)):
            assert (tuple(end.shape), end.dtype) == (shape[:-1], dtype), (
                f"{component} gives {tuple(end.shape)} {end.dtype} for blocks {shape} {dtype}"
            )
        assert (ends[0] <= ends[1]).all(), f"{component} gives a lowest above its highest"
        assert ends[0].isfinite().all() and ends[1].isfinite().all(), f"{component} gives no finite range for numbers"
        assert identical(blocks, before), f"{component} changed its blocks; range() leaves them alone"

    def test_it_gives_the_same_each_time_and_draws_no_global_random_numbers(self, component: Any) -> None:
        blocks = noise(5, 64)

        with global_randomness_untouched(component, "works"):
            first, again = self.ends(component, blocks), self.ends(component, blocks)

        assert all(map(identical, first, again)), f"{component} gives something else the second time"

    def test_blocks_do_not_see_each_other(self, component: Any) -> None:
        blocks = noise(5, 64)

        apart = [torch.cat(ends) for ends in zip(*(self.ends(component, b) for b in blocks.split(1)), strict=True)]

        assert all(map(identical, self.ends(component, blocks), apart)), f"{component}: a block's range sees the others"

    def test_zeros_have_an_empty_range(self, component: Any) -> None:
        _, high = self.ends(component, torch.zeros(3, 16))

        assert torch.equal(high, torch.zeros(3)), f"{component} reaches up to {high.tolist()} in blocks of zeros"

    @pytest.mark.parametrize("special", [torch.nan, torch.inf])
    def test_a_block_that_is_not_finite_has_no_finite_range(self, component: Any, special: float) -> None:
        blocks = noise(3, 16).abs()
        blocks[1, 2] = special

        _, high = self.ends(component, blocks)

        assert not high[1].isfinite(), f"{component} gives {high[1].item()} for a block with {special}; it must show"
        assert high[[0, 2]].isfinite().all(), f"{component}: {special} in one block spoils the others"

    def test_what_fills_up_a_block_does_not_count(self, component: Any) -> None:
        blocks = noise(3, 50).abs()
        filled, counts = (
            torch.cat([blocks, torch.zeros(3, 14)], 1),
            torch.cat([torch.ones(3, 50), torch.zeros(3, 14)], 1),
        )

        (_, high), (_, expected) = self.ends(component, filled, counts), self.ends(component, blocks)

        assert torch.allclose(high, expected), (
            f"{component} gives {high.tolist()} for blocks filled up with zeros of count 0, {expected.tolist()} without"
        )

    def test_it_serves_a_scale_found_anew_for_each_tensor(self, component: Any) -> None:
        quantizer, x = scaled(4, "token", range=component), noise(6, 40)

        y = quantizer.quantize(x)

        assert (y - x).norm() < x.norm(), f"under {quantizer} more is lost than zeros would lose"

    def test_it_serves_a_static_scale(self, component: Any) -> None:
        """Found in three batches, twice."""
        found = []
        for _ in range(2):
            model = nn.Linear(16, 4)
            data = [noise(8, 16, seed=seed) for seed in range(3)]
            quantizer = scaled(8, "tensor", range=component, static=True)
            simulation = simulate(model, activations=quantizer, calibration=data)
            (site,) = simulation.sites.table.values()
            found.append(site.fixed["input"].scale)

        assert found[0].isfinite().all() and (found[0] > 0).all(), f"{component} gives a scale {found[0]}"
        assert identical(*found), f"{component} gives another static scale for the same data"
