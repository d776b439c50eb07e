"""Measure the peak memory of a simulated forward, against the float32 model's.

    python benchmarks/memory.py [--shape 125m|1.3b] [--batch N] [--layers N] [--vocabulary N] [FORMAT …]

Each line is a process of its own. The model has the blocks of benchmarks/forward.py and OPT's vocabulary of 50,272;
the input is BATCH x 512 tokens. Embeddings are not quantized, so a small vocabulary shows what blocks hold. The
weights are overwritten (`keep=False`, as in `qsim evaluate`) or kept beside (`keep=True`).

The peak is that of the resident set, less the memory that the process held before the model was made. It is measured
twice: from the making of the model to the end of the first quantized forward, and in one later forward. Before the
later forward the freed memory of glibc's heap is given back. The limit is 1.05, overwritten.

Code that is loaded once, for a model of any size, is not counted: a block with a small vocabulary was simulated
before. Its size is printed too.
"""

from __future__ import annotations

import argparse
import ctypes
import operator
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from forward import FORMATS, SHAPES

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """The number of bytes that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Peak(threading.Thread):
    """The highest resident set while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.going = 0, True

    def run(self) -> None:
        while self.going:
            self.highest = max(self.highest, resident())
            time.sleep(0.002)


def child(name: str, keep: bool, shape: str, batch: int, layers: int, vocabulary: int) -> tuple[int, int, int]:
    """Measure one format, or the float32 model: the peak, the last forward's peak, and the loaded code, in bytes."""
    import torch
    from forward import model_of

    import qsim_core as qsim

    def run(layers: int, vocabulary: int, ids: torch.Tensor) -> torch.nn.Module:
        model = model_of(shape, layers, vocabulary)
        if name != "float32":
            recipe = qsim.Recipe(**FORMATS[name], skip=("lm_head",))  # type: ignore[arg-type]
            qsim.simulate(model, recipe, example={"input_ids": ids[:1, :64]}, keep=keep)
        model(input_ids=ids, use_cache=False)
        return model

    ids = torch.randint(0, 512, (batch, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = resident()
        run(1, 512, ids[:1, :64])
        _trim()
        before = resident()
        watch = Peak()
        watch.start()
        model = run(layers, vocabulary, ids)
        everything = watch.highest
        _trim()
        watch.highest = 0
        model(input_ids=ids, use_cache=False)
    watch.going = False
    watch.join()
    return everything - before, watch.highest - before, before - bare


def _trim() -> None:
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--vocabulary", type=int, default=50272)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, keep = given.child
        print(*child(name, keep == "keep", given.shape, given.batch, given.layers, given.vocabulary))
        return
    size = [f"--{option}={vars(given)[option]}" for option in ("shape", "batch", "layers", "vocabulary")]

    def peaks(name: str, keep: str) -> tuple[int, int, int]:
        command = [sys.executable, __file__, *size, "--child", name, keep]
        first, later, loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
        return int(first), int(later), int(loaded)

    first, later, loaded = peaks("float32", "fold")
    model = f"{given.layers} blocks of OPT-{given.shape.upper()}, {given.batch} x 512 tokens"
    print(f"{model}: the float32 model peaks at {first / 2**20:.0f} MiB")
    print(f"(and {loaded / 2**20:.0f} MiB that are loaded once)")
    print("format    overwritten  a later forward  kept beside  a later forward  loaded once, MiB more")
    for name in given.formats or FORMATS:
        found = [peaks(name, keep) for keep in ("fold", "keep")]
        ratios = [ratio for each in found for ratio in map(operator.truediv, each[:2], (first, later))]
        line = f"{name:9} {ratios[0]:11.2f} {ratios[1]:16.2f} {ratios[2]:12.2f} {ratios[3]:16.2f}"
        print(f"{line} {(found[0][2] - loaded) / 2**20:22.0f}")


if __name__ == "__main__":
    main()
