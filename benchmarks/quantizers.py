"""Time quantizers, against `x.clone()`.

    python benchmarks/quantizers.py [--sizes MB,MB,…] [--rounds N] [--device cuda] [TEXT …]

The tensors are float32 in several sizes (rows of 1,024), and the same elements in bfloat16. Each round runs `clone`,
the kernels and the reference in Python in turn, in one process. Medians of the ratios clone / quantizer are printed:
1.00 is as fast as a copy. For large tensors both spend most of their time on page faults of fresh memory.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import torch
from qsim_fast.kernels import native
from timing import machine, seconds

import qsim_core as qsim

TEXTS = ["token(int8)", "token(int8, symmetric=false)", "tensor(int8)", "abfp(int4, n=64)", "e4m3", "token(e4m3)"]
TEXTS += ["mxfp8_e4m3", "mxfp4", "nvfp4"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="quantizers, like 'abfp(int4)'")
    parser.add_argument("--sizes", default="1,16,128,1024", help="megabytes of float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    given = parser.parse_args()
    times = 1 if given.device == "cpu" else 20  # to keep a GPU busy
    print(f"{machine(given.device)}; ratios to x.clone(): kernels (Python)")
    sizes = [int(size) for size in given.sizes.split(",")]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {size: torch.randn(size * 256, 1024).to(given.device, dtype) for size in sizes}
        heads = "".join(f"{f'{size} MB':>16}" for size in sizes)
        print(f"{str(dtype).removeprefix('torch.'):32}{heads}")
        for text in given.texts or TEXTS:
            quantizer = qsim.parse(text)
            line = ""
            for x in tensors.values():
                fast, slow = [], []
                quantize = functools.partial(quantizer.quantize, x)  # type: ignore[attr-defined]
                for round_ in range(given.rounds + 1):
                    copy = seconds(x.clone, times)
                    with native.only(True):
                        fast.append(copy / seconds(quantize, times))
                    if round_ < 3:  # the reference is slow
                        with native.only(False):
                            slow.append(copy / seconds(quantize))
                line += f"{statistics.median(fast[1:]):8.2f} ({statistics.median(slow[1:]):.2f})".rjust(16)
            print(f"{text:32}{line}")


if __name__ == "__main__":
    main()
