"""Time the prediction of `qsim blame` against a forward of the same samples: `python benchmarks/blame.py MODEL…`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from qsim_study.blame.gradient import predict, spread
from timing import cpu_seconds, machine, seconds

from qsim_core import Bench, Recipe, Run, simulate
from qsim_core.evaluation.job import Job
from qsim_core.transforms.forward import as_in_evaluation, call

BATCH = 8
RECIPES: dict[str, dict[str, Any]] = {
    "int4, int8": {"weights": "int4", "activations": "int8"},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
    "int4, int8, outputs bf16": {"weights": "int4", "activations": "int8", "outputs": "bf16"},
}


def row(name: str, title: str, samples: int, device: str) -> tuple[float, float, float]:
    """Seconds of the forwards as the model is, of those under the recipe, and of the prediction; the best of three.

    On a processor they are its own seconds.
    """
    taken = cpu_seconds if device == "cpu" else seconds
    bench = Bench(name, device=device)
    job = Job.at(bench.located, Recipe.of({"model": name, **RECIPES[title]}, bench.host), bench.host)
    loaded, data = bench.load(), job.data(None)
    chosen = spread(job.evaluator.training(loaded, data, None), samples)
    batches = [
        {key: torch.stack([sample[key] for sample in chosen[start : start + BATCH]]).to(device) for key in chosen[0]}
        for start in range(0, len(chosen), BATCH)
    ]

    def forward() -> None:
        with as_in_evaluation(loaded.model):
            for batch in batches:
                call(loaded.model, batch)

    plain = min(taken(forward) for _ in range(3))
    with simulate(loaded.model, job.recipe, example=job.evaluator.example(loaded, data)) as simulation:
        forward()
        under = min(taken(forward) for _ in range(3))
        run = Run(batch_size=BATCH)
        predicted = min(taken(lambda: predict(simulation, chosen, run)) for _ in range(3))
    return plain, under, predicted


def main() -> None:
    """Print a row for each model and recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["opt-tiny", "codegen-tiny", "bert-tiny", "vit-tiny"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"{machine(options.device)}, {options.samples} samples, {BATCH} in a batch")
    print("| model | recipe | forward, s | under the recipe, s | prediction, s | forwards | under the recipe |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        for title in RECIPES:
            plain, under, found = row(name, title, options.samples, options.device)
            times = f"{plain:.3f} | {under:.3f} | {found:.3f} | {found / plain:.1f} | {found / under:.1f}"
            print(f"| {name} | {title} | {times} |", flush=True)


if __name__ == "__main__":
    main()
