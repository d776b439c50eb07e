"""Time a simulated forward under a chip's accumulator, against the same recipe in float32.

    python benchmarks/accumulators.py [--batch N] [--layers N] [--rounds N] [ARITHMETIC …]

The model is OPT blocks of OPT-125M's shape with random weights; the input is BATCH x 512 tokens. In each round a recipe
runs with and without its arithmetic, one after the other in one process. Medians are printed, and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from forward import model_of
from qsim_fast.kernels import native
from timing import machine, seconds

import qsim_core as qsim

INTEGERS = {"weights": "int4", "activations": "int4"}
FP8 = {"weights": "channel(e4m3)", "activations": "token(e4m3)"}
RECIPES = {
    "int16": INTEGERS,
    "int16(overflow=saturate)": INTEGERS,
    "int12(overflow=saturate)": INTEGERS,
    "hopper_fp8": FP8,
    "deepseek": FP8,
    "blackwell_fp8": FP8,
    "sequential(bf16)": FP8,
    "chunked(fp16, 64)": FP8,
    "tree(bf16)": FP8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arithmetics", nargs="*", metavar="ARITHMETIC", help=", ".join(RECIPES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(machine("cpu"))
    model, ids = model_of("125m", options.layers), torch.randint(512, (options.batch, 512))
    with native.only(True), torch.no_grad():
        plain = statistics.median(seconds(lambda: model(ids)) for _ in range(options.rounds))
        for arithmetic in options.arithmetics or RECIPES:
            pair = {name: copy.deepcopy(model) for name in ("float32", arithmetic)}
            for name, simulated in pair.items():
                qsim.simulate(simulated, {**RECIPES[arithmetic], "arithmetic": name})
                simulated(ids)
            times: dict[str, list[float]] = {name: [] for name in pair}
            for _ in range(options.rounds):
                for name, simulated in pair.items():
                    times[name].append(seconds(lambda simulated=simulated: simulated(ids)))  # type: ignore[misc]
            without, with_it = (statistics.median(found) for found in times.values())
            ratios = f"{with_it / without:6.2f} of float32 sums {with_it / plain:6.2f} of the model"
            print(f"{arithmetic:28}{with_it:8.3f} s {ratios}")


if __name__ == "__main__":
    main()
