"""Measure the share of a simulated forward that goes into noticing changed weights.

    python benchmarks/fingerprints.py [--shape 125m|1.3b] [--batch N] [--layers N] [--rounds N] [FORMAT …]

The model and the formats are those of benchmarks/forward.py; the input is BATCH x 512 tokens. In each forward every
comparison of a weight with what was seen is timed where it happens, so that the weight's memory is as cold as it is in
use. Times are those of the running thread alone, and medians over rounds are printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from forward import FORMATS, SHAPES, model_of
from qsim_fast.kernels import native
from torch import Tensor

import qsim_core as qsim
from qsim_core.snapshots import Snapshot


class Timed:
    """Counts the calls of `Snapshot.holds` and `Snapshot.compare`, and the thread time that is spent in them."""

    def __init__(self) -> None:
        self.calls, self.nanoseconds = 0, 0
        self._holds, self._compare = Snapshot.holds, Snapshot.compare

    def __enter__(self) -> Timed:
        def holds(seen: Snapshot, tensor: Tensor) -> bool:
            start = time.thread_time_ns()
            held = self._holds(seen, tensor)
            self.nanoseconds += time.thread_time_ns() - start
            self.calls += 1
            return held

        def compare(seen: list[Snapshot]) -> None:
            start = time.thread_time_ns()
            self._compare(seen)
            self.nanoseconds += time.thread_time_ns() - start

        Snapshot.holds, Snapshot.compare = holds, staticmethod(compare)  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        Snapshot.holds, Snapshot.compare = self._holds, staticmethod(self._compare)  # type: ignore[method-assign]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)

    base = model_of(given.shape, given.layers)
    ids = torch.randint(0, 512, (given.batch, 512), generator=torch.Generator().manual_seed(0))
    print(f"{given.layers} blocks of OPT-{given.shape.upper()}, {given.batch} x 512 tokens, 1 thread")
    for name in given.formats or FORMATS:
        model = copy.deepcopy(base)
        recipe = qsim.Recipe(**FORMATS[name], skip=("lm_head",))  # type: ignore[arg-type]
        qsim.simulate(model, recipe, example={"input_ids": ids[:1, :64]}, keep=False)
        forwards, compared, calls = [], [], 0
        with torch.no_grad(), native.only(True):
            for _ in range(given.rounds + 2):
                with Timed() as timed:
                    start = time.thread_time_ns()
                    model(input_ids=ids, use_cache=False)
                    forwards.append(time.thread_time_ns() - start)
                compared.append(timed.nanoseconds)
                calls = timed.calls
        forward, comparing = statistics.median(forwards[2:]), statistics.median(compared[2:])
        print(
            f"{name:8} forward {forward / 1e6:8.1f} ms, {calls} comparisons {comparing / 1e6:6.3f} ms, "
            f"{comparing / forward:.2%}"
        )


if __name__ == "__main__":
    main()
