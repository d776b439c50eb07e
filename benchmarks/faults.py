"""Kill runs at random moments, flip random bits of what they keep, and count how often a number changes.

    python benchmarks/faults.py [--kills N] [--flips N] [--seed S] [NAME …]

A run that is killed is started again in the same directory until it ends; its numbers have to be those of an
undisturbed run, and no temporary file may be left. After a flipped bit a run has to give the same numbers, or one line
that says what is damaged. Each run is a fork of this process, so that nothing is imported twice. The script exits with
1 if a number has changed. 100 kills and 1000 flips of each take some hours.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TEXT = str(ROOT / "CONTRIBUTING.md")
SMALL = ["--limit", "1", "--json", "r.json", "--quiet", "--evaluator", "perplexity(seqlen=64)"]
CALIBRATED = ["--data", TEXT, "--calibration-data", TEXT, "--calibration-samples", "2", "--calibration-seqlen", "64"]
KEPT = ["--work-dir", "kept", *SMALL, *CALIBRATED]
TRAINED = ["--data", TEXT, "--eval-data", TEXT, "--seqlen", "32", "--batch-size", "2", "--output", "kept", *SMALL]
STUDIED = ["--data", TEXT, "--output", "kept", *SMALL]
EXPORTED = ["--to", "compressed-tensors", "--output", "out", "--quiet"]
TEMPORARY = ("tmp*", "*.part", "*.build", "part")
"""Names of files and folders in which something is being written."""


@dataclass(frozen=True)
class Scenario:
    """A command, and the numbers in which two of its runs have to agree."""

    command: list[str]
    numbers: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None
    """Turns the directory of a run that has ended into that of a run that goes on from what was kept."""
    fill: Callable[[], None] | None = None
    """Puts files into an empty directory, before a run; bits of them are not flipped."""


def evaluated() -> Any:
    """The metrics and the intervals of `qsim evaluate`, and what its transforms did."""
    result = json.loads(Path("r.json").read_text())
    return [result[key] for key in ("baseline", "simulated", "intervals", "warnings")]


def trained() -> Any:
    """The metrics and the losses of `qsim finetune`, and the digests of the weights that it has written."""
    result = json.loads(Path("r.json").read_text())
    metrics = [result[when][which] for when in ("before", "after") for which in ("baseline", "simulated")]
    return [*metrics, result["log"], *map(digest, sorted(Path("kept").glob("*.safetensors")))]


def studied() -> Any:
    """The rows of `qsim study` but for their seconds, and its comparisons."""
    found = json.loads(Path("r.json").read_text())
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in found["rows"]]
    return [rows, found["comparisons"]]


def exported() -> Any:
    """The digests of the files that `qsim export` has written, by name."""
    return {path.name: digest(path) for path in Path("out").iterdir()}


def blocks() -> None:
    """Put 300 folders of finished blocks into a work directory, and another's file into every tenth."""
    for number in range(300):
        folder = Path("kept") / f"{number:016x}"
        folder.mkdir(parents=True)
        (folder / "block-000.pt").write_bytes(b"1234")
        if number % 10 == 0:
            (folder / "notes.txt").write_text("mine")


def left_over() -> Any:
    """The digests of the files that `qsim cache --clear` has left, by path, and the folders."""
    return {str(path): path.is_file() and digest(path) for path in sorted(Path("kept").rglob("*"))}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def go_on() -> None:
    """Make a training that has ended one that stopped before its last result."""
    Path("kept/after.json").unlink(missing_ok=True)


MODEL = str(ROOT / "plugins" / "zoo" / "qsim_zoo" / "models" / "opt-tiny" / "model.safetensors")
TRAINING = ["--precision", "w4a8", "--steps", "6", "--checkpoint-every", "2", "--resume", *TRAINED]
SCENARIOS = {
    "gptq": Scenario(["evaluate", "opt-tiny", "--precision", "w4a16", "--plugin", "gptq", *KEPT], evaluated),
    "rptq": Scenario(["evaluate", "opt-tiny", "--precision", "w4a8", "--plugin", "rptq", *KEPT], evaluated),
    "static": Scenario(["evaluate", "opt-tiny-outliers", "--precision", "w4a8", "--static", "mse", *KEPT], evaluated),
    "finetune": Scenario(["finetune", "opt-tiny", *TRAINING], trained, go_on),
    "quantize": Scenario(
        ["quantize", MODEL, "out.safetensors", "--weights", "abfp(int4)", "--quiet"],
        lambda: digest(Path("out.safetensors")),
    ),
    "study": Scenario(
        ["study", "--vary", "model=opt-tiny", "--vary", "weights=int4,e2m1", "--vary", "activations=int8", *STUDIED],
        studied,
    ),
    "export": Scenario(
        [
            "export",
            "opt-tiny",
            "--weights",
            "block(int8, 32)",
            "--to",
            "compressed-tensors",
            "--output",
            "out",
            "--quiet",
        ],
        exported,
    ),
    "clear": Scenario(["cache", "--work-dir", "kept", "--clear", "blocks", "--yes"], left_over, fill=blocks),
}


def start(command: list[str]) -> int:
    """Start a command of qsim in a fork of this process; what it prints goes to the file `said`."""
    process = os.fork()
    if process:
        return process
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from qsim_core.cli.main import main

    try:
        main(command, prog_name="qsim")
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def ended(process: int, seconds: float | None = None) -> bool:
    """Wait for a process, and kill it after so many seconds. True if it had ended before."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while os.waitpid(process, 0 if deadline is None else os.WNOHANG) == (0, 0):
        if deadline is not None and time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return False
        time.sleep(0.002)
    return True


def fresh(scenario: Scenario) -> None:
    """Empty the current directory, and fill it for a run; the cache stays."""
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if scenario.fill is not None:
        scenario.fill()


def kill(scenario: Scenario, times: int, whole: float, expected: Any, draw: random.Random) -> Counter[str]:
    """Kill a command so many times, at moments drawn over the seconds of a whole run."""
    found: Counter[str] = Counter()
    while found["kills"] < times:
        fresh(scenario)
        while not ended(start(scenario.command), draw.uniform(0, whole) if found["kills"] < times else None):
            found["kills"] += 1
        found["runs that ended"] += 1
        found["other numbers"] += outcome(scenario, expected) != "the same"
        found["temporary files"] += len([path for name in TEMPORARY for path in Path().rglob(name)])
    return found


def outcome(scenario: Scenario, expected: Any) -> str:
    """Say how a run that has ended compares with the undisturbed one."""
    said = Path("said").read_text()
    if "Traceback" in said:
        print(said, file=sys.stderr)
        return "a traceback"
    with contextlib.suppress(OSError):
        return "the same" if scenario.numbers() == expected else "other numbers"
    return "one line" if said.startswith("Error: ") and said.count("\n") == 1 else f"nothing ({said[:200]!r})"


def flip(scenario: Scenario, times: int, expected: Any, cache: Path, draw: random.Random) -> Counter[str]:
    """Flip so many bits, one before each run, in the files that a run has kept."""
    found: Counter[str] = Counter()
    fresh(scenario)
    ended(start(scenario.command))
    scenario.prepare()
    with tempfile.TemporaryDirectory(prefix="qsim-faults-") as folder:
        places = {"kept": Path("kept"), "cache": cache}
        for name, place in places.items():
            shutil.copytree(place, Path(folder) / name) if place.exists() else None
        for _ in range(times):
            files = [path for place in places.values() for path in sorted(place.rglob("*")) if path.is_file()]
            path = draw.choice([path for path in files if path.stat().st_size and path.name != ".qsim"])
            content = bytearray(path.read_bytes())
            bit = draw.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            Path("r.json").unlink(missing_ok=True)
            ended(start(scenario.command))
            said = outcome(scenario, expected)
            if said not in ("the same", "one line"):
                print(f"{said}: bit {bit} of {path}", file=sys.stderr)
            found["flips"] += 1
            found[said] += 1
            for name, place in places.items():
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(Path(folder) / name, place) if (Path(folder) / name).exists() else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS), default=[])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import qsim_finetune.trainer  # noqa: F401 - imported once, and not in each fork
    import transformers  # noqa: F401

    import qsim_core  # noqa: F401

    bad = 0
    with tempfile.TemporaryDirectory(prefix="qsim-faults-") as folder:
        cache = Path(folder, "cache")
        os.environ["QSIM_CACHE"] = str(cache)
        build = "from qsim_fast.kernels import native; native.load(build=True)"
        subprocess.run([sys.executable, "-c", build], check=False)
        for name in options.names or SCENARIOS:
            scenario, draw = SCENARIOS[name], random.Random(f"{name} {options.seed}")
            (Path(folder) / name).mkdir()
            os.chdir(Path(folder) / name)
            for _ in range(2):  # the second is timed: the first has compiled files to write
                fresh(scenario)
                begin = time.monotonic()
                ended(start(scenario.command))
            whole, expected = time.monotonic() - begin, scenario.numbers()
            for found in (
                kill(scenario, options.kills, whole, expected, draw),
                flip(scenario, options.flips, expected, cache, draw)
                if Path("kept").exists() and not scenario.fill
                else Counter(),
            ):
                if found:
                    print(f"{name}: " + ", ".join(f"{many} {what}" for what, many in found.items()), flush=True)
                good = ("kills", "runs that ended", "flips", "the same", "one line")
                bad += sum(many for what, many in found.items() if what not in good)
        os.chdir("/")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
