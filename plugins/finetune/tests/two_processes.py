"""The work of each of two processes under DistributedDataParallel. It is a module, because the processes import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsim_core as qsim

STEPS = 4


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that learns its steps, and 8 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4))
    x, y = torch.randn(8, 16), torch.randn(8, 4)
    qsim.simulate(
        model,
        weights="channel(int4, gradient=lsq)",
        activations="block(int8, 4, gradient=lsq)",
        overrides={"2": {"activations": "token(int4)"}},
        example=x,
    )
    return model, x, y


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Some steps on all samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def on_half_of_the_data(rank: int, directory: str) -> None:
    """Train on every other sample, and let the first process save what came out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    model, x, y = model_and_data()
    parallel: Any = nn.parallel.DistributedDataParallel(model)
    train(parallel, x[rank::2], y[rank::2])
    torch.save(dict(model.named_parameters()), Path(directory) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()
