"""Time the Python that a forward spends at one site.

    python benchmarks/site.py [--sites N] [--rounds N]

The model is a chain of N linear layers of 16 x 16 with one row of input, so that multiplying and quantizing take almost
no time. Each round runs all models in turn, in one thread. Printed are medians of the thread's time, less that of the
float32 model, for each site.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import qsim_core as qsim

RECIPES = {
    "nothing quantized": {},
    "weights": {"weights": "int8"},
    "weights and inputs": {"weights": "int8", "activations": "int8"},
    "weights, inputs and outputs": {"weights": "int8", "activations": "int8", "outputs": "bf16"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(given.sites))).eval()
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    models: dict[str, nn.Module] = {"float32": base}
    for name, recipe in RECIPES.items():
        models[name] = copy.deepcopy(base)
        qsim.simulate(models[name], **recipe, arithmetic="float32", example=x)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(given.rounds + 2):
            for name, model in models.items():
                start = time.thread_time_ns()
                model(x)
                times[name].append((time.thread_time_ns() - start) / given.sites / 1000)
    medians = {name: statistics.median(measured[2:]) for name, measured in times.items()}
    plain = medians.pop("float32")
    print(f"{given.sites} linear layers, one row, 1 thread; a plain layer takes {plain:.1f} us")
    for name, median in medians.items():
        print(f"{name:30} {median - plain:7.1f} us at a site")


if __name__ == "__main__":
    main()
