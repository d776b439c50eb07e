"""A run of more samples computes the batches that an earlier one of fewer has not."""

from __future__ import annotations

import torch
from torch import Tensor

import qsim_core as qsim


def summed(samples: int, known: dict[int, Tensor]) -> tuple[list[float], list[int]]:
    """The squares of so many samples in batches of 4, and the first samples of the batches that were computed."""
    computed = []

    def squares(batch: Tensor) -> Tensor:
        computed.append(int(batch[0]))
        return batch.square().unsqueeze(0)

    batches = torch.arange(samples).split(4)
    return qsim.Run(batch_size=4, known=known).over(batches, squares, "squares")[0].tolist(), computed


def test_whole_batches_are_known_afterwards() -> None:
    known: dict[int, Tensor] = {}
    summed(10, known)

    numbers, computed = summed(17, known)

    assert numbers == [x**2 for x in range(17)]
    assert computed == [8, 12, 16]


def test_a_run_of_fewer_samples_knows_no_batch_that_is_longer_than_its_own() -> None:
    known: dict[int, Tensor] = {}
    summed(12, known)

    assert summed(6, known)[0] == [x**2 for x in range(6)]
