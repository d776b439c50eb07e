"""Operations that the sandbox forbids, which a plain process may do, and those that it allows."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qsim_evaluators import sandbox
from qsim_evaluators.confined import ALLOW, EPERM, EQUAL, ERRNO, LOAD, NUMBER, RETURN

import qsim_core as qsim

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
MACHINE = platform.machine()
REFUSED = "failed: PermissionError"
PER_LINUX, PER_LINUX32 = 0, 8
FORBIDDEN = {
    "a socket": "import socket; socket.socket()",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a file to write": "open('{tmp}/written', 'w')",
    "a file to append to": "open('{tmp}/there', 'a')",
    "a file to read and write": "open('{tmp}/there', 'r+')",
    "a truncated file": "import os; os.open('{tmp}/there', os.O_RDONLY | os.O_TRUNC)",
    "a file without a name": "import os; os.open('{tmp}', os.O_TMPFILE | os.O_RDWR)",
    "a removed file": "import os; os.remove('{tmp}/there')",
    "a renamed file": "import os; os.rename('{tmp}/there', '{tmp}/moved')",
    "a link": "import os; os.symlink('/', '{tmp}/link')",
    "a directory": "import os; os.mkdir('{tmp}/directory')",
    "other permissions": "import os; os.chmod('{tmp}/there', 0o777)",
    "a fork": "import os; os.fork()",
    "a program": "import subprocess; subprocess.run(['true'], check=True)",
    "another program in its place": "import os; os.execv('/bin/true', ['true'])",
    "a signal to its parent": "import os; os.kill(os.getppid(), 0)",
    "a signal by way of a file": "import fcntl, os; fcntl.fcntl(os.open('/dev/null', 0), fcntl.F_SETOWN, os.getpid())",
    "memory as a file": "import os; os.memfd_create('x')",
}  # fmt: skip


def plain(program: str) -> int:
    """Run a program in an unconfined process, and return its exit status."""
    return subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("program", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_plain_process_may_do_and_a_confined_one_may_not(program: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    program = program.replace("{tmp}", str(tmp_path))

    verdict = sandbox.run(program)

    assert verdict.startswith(REFUSED)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there", "kept")]
    assert plain(program) == 0


@pytest.mark.parametrize(
    "call", ["fork", "vfork", "clone", "clone3", "openat2", "ptrace", "bpf", "io_uring_setup", "madvise"]
)
def test_calls_that_the_libraries_do_not_make(call: str) -> None:
    numbers = {
        "x86_64": {"fork": 57, "vfork": 58, "clone": 56, "ptrace": 101, "bpf": 321, "madvise": 28},
        "aarch64": {"clone": 220, "ptrace": 117, "bpf": 280, "madvise": 233},
    }
    number = numbers[MACHINE] | {"clone3": 435, "openat2": 437, "io_uring_setup": 425}
    if call not in number:
        pytest.skip(f"{MACHINE} has no {call}")
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
answer = libc.syscall({number[call]}, 0, 0, 100, 0, 0)
assert (answer, ctypes.get_errno()) == (-1, {EPERM})
"""

    assert sandbox.run(program) == "passed"


def test_a_limit_cannot_be_lifted() -> None:
    program = "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))"

    assert sandbox.run(program) == "failed: ValueError"


def test_threads_are_processes_too() -> None:
    program = "import threading; threading.Thread(target=print).start()"

    assert sandbox.run(program) == "failed: RuntimeError"


BOMB = """
import os
while True:
    try:
        os.fork()
    except {error}:
        pass
"""


def test_a_fork_bomb_does_not_go_off() -> None:
    assert sandbox.run(BOMB.format(error="MemoryError")) == REFUSED
    assert sandbox.run(BOMB.format(error="OSError"), seconds=1) == "timed out"


def test_an_endless_loop_uses_up_its_processor_time() -> None:
    start = time.monotonic()

    assert sandbox.run("while True: pass", seconds=1) == "timed out"
    assert time.monotonic() - start < sandbox.SLOWER


def test_a_loop_that_does_not_heed_the_signal_is_killed() -> None:
    program = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"

    assert sandbox.run(program, seconds=1) in ("failed: killed by SIGKILL", "timed out")  # whichever limit comes first


@pytest.mark.parametrize("program", ["import time; time.sleep(600)", "import os\nwhile True: os.write(3, b'x' * 4096)"])
def test_a_program_that_waits_is_killed(program: str) -> None:
    start = time.monotonic()

    assert sandbox.run(program, seconds=1) == "timed out"
    assert sandbox.SLOWER <= time.monotonic() - start < 2 * sandbox.SLOWER


def test_memory_is_bounded() -> None:
    assert sandbox.run("x = bytearray(2**30)") == "failed: MemoryError"
    assert sandbox.run("x = bytearray(2**28)") == "passed"


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("import sys; sys.exit(0)", "failed: SystemExit"),
        ("import os; os._exit(0)", "failed: it exited with status 0"),
        ("import os; os.write(3, b'[' * 60_000); os._exit(0)", "failed: it exited with status 0"),
        ("import os; os.write(3, b'{\"reason\": null}'); os._exit(0)", "failed: it exited with status 0"),
        ("import ctypes; ctypes.string_at(0)", "failed: killed by SIGSEGV"),
        ("assert 1 == 2, 'one\\nis not two'", "failed: AssertionError"),
        ("def f(:", "failed: SyntaxError: invalid syntax (program, line 1)"),
        ("raise ValueError('what it has read')", "failed: ValueError"),
        ("raise type('what_it_has_read', (KeyError,), {})", "failed: KeyError"),
    ],
)
def test_only_the_end_is_a_pass(program: str, verdict: str) -> None:
    assert sandbox.run(program) == verdict


def test_what_programs_need_is_there() -> None:
    program = """
import collections, dataclasses, hashlib, heapq, itertools, json, math, re, time, typing

@dataclasses.dataclass
class Point:
    x: "int"

assert Point(1) == Point(1) and __name__ == "program"
print("x" * 100_000)
time.sleep(0.01)
assert open(json.__file__).read()
try:
    input()
except EOFError:
    pass
"""

    assert sandbox.run(program) == "passed"


def test_hashes_and_random_numbers_are_the_same_each_time() -> None:
    program = "import random; assert (hash('x') % 1000, int(random.random() * 1000)) == {}"

    assert sandbox.run(program.format((363, 844))) == "passed"


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[]", b"[" * 50_000, b"\xff", b'{"unconfined": "x"}', b'{"reason": null}', b"Error", b"\nValueError"],
    ids=lambda answer: repr(answer[:8]),
)
def test_a_forged_answer_fails_its_program_and_is_not_repeated(answer: bytes) -> None:
    program = f"""
import os, sys
frame = sys._getframe()
while "request" not in frame.f_locals:
    frame = frame.f_back
os.write(frame.f_locals["answer"], frame.f_locals["request"]["token"].encode() + {answer!r} + b"!")
os._exit(0)
"""

    assert sandbox.run(program) == "failed: it exited with status 0"


PRYING = """
import os
for process in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "mem", "maps", "fd", "cwd"):
        try:
            path = f"/proc/{process}/{name}"
            content = os.listdir(path) if name == "fd" else os.readlink(path) if name == "cwd" else open(path).read()
        except OSError:
            continue
        assert not content or int(process) == os.getpid(), path  # threads of the kernel have none
"""


def test_no_other_process_can_be_looked_into() -> None:
    program = f"from qsim_evaluators import sandbox; print(sandbox.run({PRYING!r}))"

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert said.stdout == "passed\n"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root has rights to lose")
def test_programs_of_root_are_run_by_another_user_without_capabilities() -> None:
    program = """
import os
assert (os.getuid(), os.getegid()) == (65534, 65534)
state = [line.split() for line in open("/proc/self/status") if line.startswith(("CapPrm", "CapEff", "CapAmb"))]
assert [int(bits, 16) for _, bits in state] == [0, 0, 0]
open("/etc/shadow")
"""

    assert sandbox.run(program) == "failed: PermissionError"


def confined(program: str, **changes: int) -> int:
    """Run a program without `sandbox`, as if that had been killed, and return the exit status."""
    limits = {"seconds": 5, "clock": 60, "memory": sandbox.MEMORY, "parent": os.getpid()}
    asked = json.dumps({"program": program, "token": "", **limits, **changes})
    return subprocess.run([sys.executable, str(sandbox.RUNNER)], input=asked, text=True, capture_output=True).returncode


def test_a_program_whose_parent_has_ended_before_it_starts_does_not_run() -> None:
    assert confined("", parent=1) == 1
    assert confined("") == 0


def test_a_program_ends_by_the_clock_even_if_no_process_waits_for_it() -> None:
    program = """
import signal, time
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1000)
"""
    start = time.monotonic()

    assert confined(program, clock=1) == -signal.SIGKILL
    assert time.monotonic() - start < 30


def test_an_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")

    assert sandbox.run("import os; assert 'HF_TOKEN' not in os.environ") == "passed"


def test_an_unknown_processor_is_refused() -> None:
    if MACHINE != "x86_64":
        pytest.skip("only x86_64 can be made to look like another")
    libc = ctypes.CDLL(None)
    libc.personality(PER_LINUX32)
    try:
        with pytest.raises(qsim.QsimError) as error:
            sandbox.check.__wrapped__()
    finally:
        libc.personality(PER_LINUX)

    assert str(error.value) == (
        "generated code cannot be confined here: seccomp filters are written for x86_64 and aarch64, and this is i686"
    )


def test_a_kernel_that_installs_no_filter_is_refused() -> None:
    prctl = {"x86_64": 157, "aarch64": 167}[MACHINE]
    instructions = [(LOAD, 0, 0, NUMBER), (EQUAL, 0, 1, prctl), (RETURN, 0, 0, ERRNO | 22), (RETURN, 0, 0, ALLOW)]
    program = f"""
import ctypes, struct
from qsim_evaluators import sandbox
code = b"".join(struct.pack("HBBI", *part) for part in {instructions})
kept = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", 4, ctypes.addressof(kept)), 0, 0) == 0
try:
    sandbox.check()
except Exception as error:
    print(error)
"""

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert said.stdout == "generated code cannot be confined here: the kernel refuses prctl 1: Invalid argument\n"


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")

    with pytest.raises(qsim.QsimError) as error:
        sandbox.check.__wrapped__()

    assert str(error.value) == (
        "generated code cannot be confined here: it needs Linux's seccomp, and this system is darwin"
    )
