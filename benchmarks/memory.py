"""How much memory a simulated forward takes at its peak, against the float32 model's.

    python benchmarks/memory.py [--batch N] [--layers N] [FORMAT …]

Each line is a process of its own: blocks as in benchmarks/forward.py beside OPT's vocabulary of 50,272, BATCH x 512
tokens. The weights are overwritten (`keep=False`, what `qsim evaluate` does) or kept beside (`keep=True`). Peak is the
resident set's, less what the process held before the model was made. The limit is 1.05, overwritten.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from forward import FORMATS

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes that this process holds in memory."""
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


def child(name: str, keep: bool, batch: int, layers: int) -> int:
    """The peak of one format, or of the float32 model, in bytes."""
    import torch
    from forward import model_of

    import qsim_core as qsim

    before = resident()
    model = model_of("125m", layers, vocabulary=50272)
    ids = torch.randint(0, 512, (batch, 512), generator=torch.Generator().manual_seed(0))
    watch = Peak()
    watch.start()
    with torch.no_grad():
        if name != "float32":
            recipe = qsim.Recipe(**FORMATS[name], skip=("lm_head",))  # type: ignore[arg-type]
            qsim.simulate(model, recipe, example={"input_ids": ids[:1, :64]}, keep=keep)
        for _ in range(2):
            model(input_ids=ids, use_cache=False)
    watch.going = False
    watch.join()
    return watch.highest - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, keep = given.child
        print(child(name, keep == "keep", given.batch, given.layers))
        return
    size = ["--batch", str(given.batch), "--layers", str(given.layers)]

    def peak(name: str, keep: str) -> int:
        command = [sys.executable, __file__, *size, "--child", name, keep]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    base = peak("float32", "fold")
    print(f"{given.layers} blocks, {given.batch} x 512 tokens: the float32 model peaks at {base / 2**20:.0f} MiB")
    print("format    overwritten  kept beside")
    for name in given.formats or FORMATS:
        print(f"{name:9} {peak(name, 'fold') / base:11.2f} {peak(name, 'keep') / base:12.2f}")


if __name__ == "__main__":
    main()
