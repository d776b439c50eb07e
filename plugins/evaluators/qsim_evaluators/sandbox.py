"""Run programs that a model wrote, each in a process that can only compute and read files.

A program cannot write, create, rename or remove a file. It cannot open a socket, start a process or a thread, or
signal another process. Its memory and time are limited, and it is killed when its time is over. `confined` describes
the mechanisms. A program can read all files that the user can read. Of its output, only the first line of an error
leaves the process.

This does not replace a container or a virtual machine. The program shares the kernel, so it can escape by a
vulnerability of the kernel. A program that manipulates the sandbox's objects in its process can report a false success.
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
"""Wall-clock time of a program as a multiple of its processor time, as other processes use the processor too."""
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
    """Raise `QsimError` with the reason if programs cannot be confined here.

    The check runs a program that tries all forbidden operations.
    """
    if sys.platform != "linux":
        raise _unconfined(f"it needs Linux's seccomp, and this system is {sys.platform}")
    if (verdict := run(PROBE)) != PASSED:
        raise _unconfined(verdict)


def run(program: str, seconds: int = 3, memory: int = MEMORY) -> str:
    """Run a Python program. Return `passed` if it reaches its end, else `timed out`, or `failed: ` and the reason.

    It may use `seconds` of processor time, four times as many by the clock, and `memory` bytes of address space.
    Hashes and `random` are seeded. Raises `QsimError` without running the program if the kernel does not confine it.
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
        answer = os.read(process.stdout.fileno(), LONGEST_ANSWER)  # complete: an answer fits into the pipe
    return _verdict(answer, token, process.returncode)


def _verdict(answer: bytes, token: str, code: int) -> str:
    if not answer.startswith(token.encode()):  # output of the program is not parsed
        return _ending(code)
    report = json.loads(answer[len(token) :])
    if "unconfined" in report:
        raise _unconfined(report["unconfined"])
    return PASSED if report["reason"] is None else f"failed: {report['reason']}"


def _unconfined(reason: str) -> QsimError:
    return QsimError(f"generated code cannot be confined here: {reason}")


def _ending(code: int) -> str:
    """Describe the end of a process that wrote no answer."""
    if code == -signal.SIGXCPU:
        return TIMED_OUT
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    return f"failed: it exited with status {code}"
