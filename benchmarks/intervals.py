"""Count how often confidence intervals hold the true value, for laws of which it is known.

    python benchmarks/intervals.py [--trials N] [--seed S]

Prints a table for docs/result.md: the percentage of 95% intervals of a mean, or of the ratio of two paired means, that
hold the true value. 2000 trials take about a minute on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from qsim_core.evaluation.metrics import interval

SIZES = (8, 16, 32, 64)
Draw = Callable[[tuple[int, int], torch.Generator], Tensor]
"""A function of a shape `[trials, samples]` that draws samples in float64."""


def normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def exponential(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return -(1 - uniform(shape, generator)).log()


def lognormal(sigma: float) -> Draw:
    return lambda shape, generator: (sigma * normal(shape, generator)).exp()


def student(degrees: int) -> Draw:
    def draw(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        squares = sum(normal(shape, generator).square() for _ in range(degrees))
        return normal(shape, generator) / (squares / degrees).sqrt()

    return draw


MEANS: dict[str, tuple[Draw, float]] = {
    "normal": (normal, 0.0),
    "uniform": (uniform, 0.5),
    "Student's t, 4 degrees": (student(4), 0.0),
    "exponential": (exponential, 1.0),
    "lognormal, σ = 0.5": (lognormal(0.5), math.exp(0.125)),
    "lognormal, σ = 1": (lognormal(1.0), math.exp(0.5)),
    "lognormal, σ = 1.5": (lognormal(1.5), math.exp(1.125)),
}
"""Laws of samples, each with its mean."""
PAIRS: dict[str, Draw] = {
    "normal": lambda shape, generator: 4 + normal(shape, generator) / 2,
    "exponential": exponential,
    "lognormal, σ = 1": lognormal(1.0),
}
"""Laws of the baseline's samples. The simulated run's are 1.1 times them, with noise of 10%."""


def left_out(samples: Tensor) -> Tensor:
    """The mean of samples `[..., samples]` without each of them."""
    means: Tensor = (samples.sum(-1, keepdim=True) - samples) / (samples.shape[-1] - 1)
    return means


def held(values: Tensor, without: Tensor, true: float) -> float:
    """The percentage of intervals that hold the true value."""
    found = [interval(*pair) for pair in zip(values, without, strict=True)]
    return 100 * sum(low <= true <= high for low, high in found) / len(found)


def of_mean(draw: Draw, true: float, shape: tuple[int, int], generator: torch.Generator) -> float:
    """The percentage of intervals of a mean that hold it."""
    samples = draw(shape, generator)
    return held(samples.mean(-1), left_out(samples), true)


def of_ratio(draw: Draw, shape: tuple[int, int], generator: torch.Generator) -> float:
    """The percentage of intervals of a ratio of paired means that hold it."""
    before = draw(shape, generator)
    after = before * 1.1 * (0.1 * normal(shape, generator) - 0.005).exp()
    return held(after.mean(-1) / before.mean(-1), left_out(after) / left_out(before), 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    print("| samples | " + " | ".join(map(str, SIZES)) + " |\n|---|" + "---|" * len(SIZES))
    for name, (draw, true) in MEANS.items():
        cells = [of_mean(draw, true, (options.trials, size), generator) for size in SIZES]
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)
    for name, pair in PAIRS.items():
        cells = [of_ratio(pair, (options.trials, size), generator) for size in SIZES]
        print(f"| ratio of pairs, {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
