"""Time `qsim --help` and `qsim plugins`, against the import of the three libraries that they use.

    python benchmarks/startup.py [ROUNDS]

Each round measures all commands in turn. The median ratios of wall times are printed. The limit is 1.5.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

BASE = ["-c", "import click, pluggy, pydantic"]
COMMANDS = {
    "qsim --help": ["-c", "from qsim_core.cli.main import main; main(['--help'])"],
    "qsim plugins": ["-c", "from qsim_core.cli.main import main; main(['plugins'])"],
}


def seconds(arguments: list[str]) -> float:
    """Measure the wall time of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(rounds: int) -> None:
    """Measure and print."""
    seconds(BASE)
    ratios: dict[str, list[float]] = {name: [] for name in COMMANDS}
    base: list[float] = []
    for _ in range(rounds):
        base.append(seconds(BASE))
        for name, arguments in COMMANDS.items():
            ratios[name].append(seconds(arguments) / base[-1])
    print(f"{'import click, pluggy, pydantic':32} {statistics.median(base) * 1000:6.0f} ms")
    for name, values in ratios.items():
        print(f"{name:32} {statistics.median(values):6.2f} times that (limit 1.5)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
