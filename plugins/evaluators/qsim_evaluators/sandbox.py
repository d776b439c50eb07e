"""Run programs that a model wrote, each in a process that can only compute and read files.

A program cannot write, create, rename or remove a file. It cannot open a socket, start a process or a thread, or
signal another process. Its memory and time are limited, and it is killed when its time is over, or when qsim ends.
`confined` describes the mechanisms. A program can read the files that the user can read, or, if that is root, the user
`nobody`. It cannot read the memory or the environment of qsim. Of its output, only the kind of its error leaves the
process.

This does not replace a container or a virtual machine. The program shares the kernel, so it can escape by a
vulnerability of the kernel. A program that manipulates the sandbox's objects in its process can report a false success.
"""

from __future__ import annotations

import builtins
import ctypes
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
PR_SET_DUMPABLE = 4
ERRORS = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
"""The names that a program's end can have. Anything else that it writes is not repeated."""


@functools.cache
def check() -> None:
    """Raise `QsimError` with the reason if programs cannot be confined here."""
    if sys.platform != "linux":
        raise _unconfined(f"it needs Linux's seccomp, and this system is {sys.platform}")
    if (verdict := run("")) != PASSED:
        raise _unconfined(verdict)


def run(program: str, seconds: int = 3, memory: int = MEMORY) -> str:
    """Run a Python program. Return `passed` if it reaches its end, else `timed out`, or `failed: ` and the reason.

    It may use `seconds` of processor time, four times as many by the clock, and `memory` bytes of address space.
    Hashes and `random` are seeded. Raises `QsimError` without running the program if the kernel does not confine it.
    """
    _hide()
    token = secrets.token_hex()
    limits = {"seconds": seconds, "clock": SLOWER * seconds + 1, "memory": memory, "parent": os.getpid()}
    request = json.dumps({"program": program, "token": token, **limits})
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


@functools.cache
def _hide() -> None:
    """Let no other process of the user read the memory and the environment of this one, from now on."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, *[ctypes.c_ulong(0)] * 4)


def _verdict(answer: bytes, token: str, code: int) -> str:
    """Read an answer: a line that was written before the program ran, then what the program may have forged."""
    first, ready, then = answer.partition(b"\n")
    report = json.loads(first) if ready else {}
    if "unconfined" in report:
        raise _unconfined(report["unconfined"])
    if "failed" in report:
        return f"failed: {report['failed']}"
    name = then.removeprefix(token.encode()).decode("ascii", "replace")
    if name == then.decode("ascii", "replace") or (name and name not in ERRORS):
        return _ending(code)
    return f"failed: {name}" if name else PASSED


def _unconfined(reason: str) -> QsimError:
    return QsimError(f"generated code cannot be confined here: {reason}")


def _ending(code: int) -> str:
    """Describe the end of a process that wrote no answer."""
    if code == -signal.SIGXCPU:
        return TIMED_OUT
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    return f"failed: it exited with status {code}"
