"""Time what surrounds a simulated forward, in forwards of the float32 model.

    python benchmarks/around.py [--layers N] [--batch N] [--rounds N]

The model has the blocks of benchmarks/forward.py and OPT's vocabulary of 50,272; the input is BATCH x 128 tokens. Times
are those of the running thread; medians of rounds are printed. The audit is that of a fresh simulation, whose first
forward quantizes the weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from forward import model_of

import qsim_core as qsim

RECIPE = {"weights": "abfp(int4)", "activations": "abfp(int8)"}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Measure the time of this thread in a call; give the call's result too."""
    start = time.thread_time()
    result = run()
    return time.thread_time() - start, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = model_of("125m", given.layers, 50272)
    example = {"input_ids": torch.randint(0, 512, (given.batch, 128), generator=torch.Generator().manual_seed(0))}
    transforms = {"SmoothQuant": ["smoothquant"]}
    ratios: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        base(**example, use_cache=False)
        for _ in range(given.rounds):
            plain, _ = seconds(lambda: base(**example, use_cache=False))
            model = copy.deepcopy(base)
            steps = {}
            steps["finding the matmuls"], simulation = seconds(
                lambda model=model: qsim.simulate(model, RECIPE, example=example, keep=False)
            )
            steps["audit, with its forward"], _ = seconds(simulation.audit)
            steps["a later forward"], _ = seconds(lambda model=model: model(**example, use_cache=False))
            for name, methods in transforms.items():
                recipe = {**RECIPE, "transforms": methods}
                model = copy.deepcopy(base)
                steps[name], _ = seconds(
                    lambda model=model, recipe=recipe: qsim.simulate(
                        model, recipe, example=example, calibration=[example], keep=False
                    )
                )
                steps[name] -= steps["finding the matmuls"]
            for name, taken in steps.items():
                ratios[name].append(taken / plain)
    print(f"{given.layers} blocks of OPT-125M, {given.batch} x 128 tokens, 1 thread, in forwards of the float32 model")
    for name, values in ratios.items():
        print(f"{name:26} {statistics.median(values):6.2f}")


if __name__ == "__main__":
    main()
