"""A program in a fork gives what a Python of its own gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PROGRAMS = {
    "arguments, input, directory and environment": "import os, sys; print(sys.argv, input(), os.getcwd(), os.environ['ASKED'])",
    "an exit code": "import sys; sys.exit(3)",
    "a message as exit code": "import sys; sys.exit('no')",
    "an end by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "what is done at exit": "import atexit; atexit.register(print, 'last')",
    "its own main module": "x = 1\nimport __main__; print(__main__.x, __name__)",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_fork_ends_as_a_process_does(program: str, tmp_path: Path) -> None:
    options = {"input": "typed\n", "cwd": tmp_path, "env": {**os.environ, "ASKED": "yes"}}

    own, fork = (
        subprocess.run([*python, "-c", program, "one"], capture_output=True, text=True, **options)  # type: ignore[call-overload]
        for python in ([sys.executable], forked.python())
    )

    assert (fork.returncode, fork.stdout, fork.stderr) == (own.returncode, own.stdout, own.stderr)


def test_one_path_is_as_good_as_the_command() -> None:
    run = subprocess.run([forked.executable(), "-c", "import sys; print(sys.argv)", "one"], capture_output=True)

    assert run.stdout == b"['-c', 'one']\n"
