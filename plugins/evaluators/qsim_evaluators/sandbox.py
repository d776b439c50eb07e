"""Programs that a model wrote, each in a process that can compute and read, and nothing else.

A program cannot write, create, rename or remove a file, open a socket, start a process or a thread, signal another
process, or use more than its share of memory and time; when its time is over it is killed. `confined` says by what
means. It can read what the user can read, and nothing that it prints or reads leaves the process but the first line of
an error. This is no substitute for a container or a virtual machine: one kernel is shared, and a hole in it is a way
out. A program that looks for the sandbox's own objects in its process can report a success that is none.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from qsim_core import QsimError

PASSED, TIMED_OUT = "passed", "timed out"
RUNNER = Path(__file__).with_name("confined.py")
MEMORY = 2**30
SLOWER = 4
"""A program's time on the clock may be so many times its time on the processor, which other processes use too."""
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
LONGEST_ANSWER = 2**16
PROBE = """
import os, resource, socket
limit = resource.RLIMIT_CPU
for name, attempt in {
    "open a socket": socket.socket,
    "start a process": lambda: os.fork() or os._exit(0),
    "open a file for writing": lambda: open(os.devnull, "w"),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "lift a limit": lambda: resource.setrlimit(limit, resource.getrlimit(limit)),
}.items():
    try:
        attempt()
    except (PermissionError, ValueError):
        continue
    raise RuntimeError(f"a confined program could {name}")
"""


@functools.cache
def check() -> None:
    """Raise `QsimError`, saying why, unless programs can be confined here: one tries all that it must not do."""
    if sys.platform != "linux":
        raise _unconfined(f"that takes Linux's seccomp, and this is {sys.platform}")
    if (verdict := run(PROBE)) != PASSED:
        raise _unconfined(verdict)


def run(program: str, seconds: int = 3, memory: int = MEMORY) -> str:
    """How a program of Python ends: `passed` if it reaches its end, `timed out`, or `failed: ` and why.

    It may take `seconds` of processor time, four times as many on the clock, and `memory` bytes of address space.
    Hashes and `random` are seeded. Raises `QsimError`, without having run it, if the kernel does not confine it.
    """
    token = secrets.token_hex()
    request = json.dumps({"program": program, "token": token, "seconds": seconds, "memory": memory})
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with tempfile.TemporaryFile() as asked:
        asked.write(request.encode())
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(RUNNER)],
            stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd="/", env=ENVIRONMENT | kept, start_new_session=True,
        )  # fmt: skip
    with process:
        try:
            process.wait(SLOWER * seconds)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        answer = os.read(process.stdout.fileno(), LONGEST_ANSWER)  # after the end: it is no more than a pipe holds
    return _verdict(answer, token, process.returncode)


def _verdict(answer: bytes, token: str, code: int) -> str:
    if not answer.startswith(token.encode()):  # what a program wrote there is not even parsed
        return _ending(code)
    report = json.loads(answer[len(token) :])
    if "unconfined" in report:
        raise _unconfined(report["unconfined"])
    return PASSED if report["reason"] is None else f"failed: {report['reason']}"


def _unconfined(reason: str) -> QsimError:
    return QsimError(f"generated code cannot be confined here: {reason}")


def _ending(code: int) -> str:
    """How a process ended that did not say."""
    if code == -signal.SIGXCPU:
        return TIMED_OUT
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    return f"failed: it left with exit status {code}"
