"""Time a study of twelve formats on three models, in one process and in two, and on 64 workers on paper.

    python benchmarks/study.py [ROUNDS [SAMPLES]]

Each round computes the whole study in a fresh folder, as a command: in one process, then in two, one thread each. On
paper, workers take the next cell as the real ones do. A worker starts, imports and loads a model as long as the
measured ones did. The efficiency of N workers is the time of one over N times their time.
"""

from __future__ import annotations

import heapq
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qsim_study.folder import Folder

FORMATS = ["int2", "int3", "int4", "int5", "int6", "int8", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "nf4"]
STUDY = f"models: [opt-tiny, codegen-tiny, bert-tiny]\nvary:\n  weights: [{', '.join(FORMATS)}]\nlimit: "
COMMAND = [sys.executable, "-c", "from qsim_core.cli.main import main; main()", "study"]


def run(folder: Path, samples: int, *options: str) -> tuple[float, list[tuple[str, float]]]:
    """Compute the study; give the wall time, and the model and the seconds of each cell."""
    file = folder / "formats.yaml"
    file.write_text(f"{STUDY}{samples}\n")
    start = time.perf_counter()
    subprocess.run(
        [*COMMAND, str(file), "--output", str(folder / "out"), "--quiet", *options],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    taken = time.perf_counter() - start
    entries = Folder.open(folder / "out").entries().values()
    return taken, [(str(entry.cell.model), entry.seconds) for entry in entries]


def on_paper(workers: int, start: float, load: float, cells: list[tuple[str, float]]) -> float:
    """The time of so many workers: each takes the next cell when it is free, and loads a model that it has not."""
    free = [(start, number, "") for number in range(workers)]
    heapq.heapify(free)
    end = start
    for model, seconds in cells:
        now, number, loaded = heapq.heappop(free)
        now += seconds + (load if model != loaded else 0)
        end = max(end, now)
        heapq.heappush(free, (now, number, model))
    return end


def main(rounds: int = 3, samples: int = 16) -> None:
    """Measure and print."""
    times: dict[str, list[float]] = {"one process": [], "two processes": []}
    cells: list[tuple[str, float]] = []
    for _ in range(rounds):
        for name, options in zip(times, ((), ("--workers", "2")), strict=True):
            with tempfile.TemporaryDirectory() as folder:
                taken, found = run(Path(folder), samples, *options)
            times[name].append(taken)
            cells = found if not options else cells
    one, two = (statistics.median(values) for values in times.values())
    print(f"36 cells: one process {one:.1f} s, two {two:.1f} s, efficiency {one / (2 * two):.2f}")
    by_model: dict[str, list[float]] = {}
    for model, seconds in cells:
        by_model.setdefault(model, []).append(seconds)
    load = statistics.median(values[0] - statistics.median(values[1:]) for values in by_model.values())
    start = one - sum(seconds for _, seconds in cells)
    even = [(model, statistics.median(by_model[model])) for model, _ in cells]
    print(
        f"a worker starts in {start:.1f} s and loads a model in {load:.1f} s; cells of {sum(s for _, s in even):.1f} s"
    )
    for workers in (2, 4, 16, 64):
        for copies in (1, 100):
            many = [cell for cell in even for _ in range(copies)]
            alone = on_paper(1, start, load, many)
            share = alone / (workers * on_paper(workers, start, load, many))
            print(f"on paper, {workers:2} workers, {len(many):4} cells: efficiency {share:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
