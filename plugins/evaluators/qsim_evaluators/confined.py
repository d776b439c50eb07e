"""Script of the sandbox's process: it gives up all rights that could do harm, then runs one program.

The script needs only the standard library; `sandbox` starts it. Mechanisms of the Linux kernel confine the process. The
process cannot undo them. Resource limits bound its memory and processor time, and a timer of the kernel its time by the
clock. The process of root becomes one of the user `nobody`, and no process keeps a capability. Where the kernel has
Landlock, the process cannot look into any other. A seccomp filter (man 2 seccomp) allows only the system calls that
Python needs to compute, import and read files. All other calls fail with EPERM, and so do these calls with arguments
that write. Calls that are not in `CALLS` or `GUARDED` are refused, also new calls of later kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import random
import resource
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
EPERM = 1
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
"""BPF: load a word of the call's data; jump if it equals a constant; jump if it shares a bit with one; return."""
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in the kernel's `struct seccomp_data`. An argument has 8 bytes, its low half first."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000
"""Flags with which open writes. The last one is the bit that only O_TMPFILE has."""
HARMLESS_FCNTL = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL and F_DUPFD_CLOEXEC. Others send signals, or change locks, leases and pipes."""
HARMLESS_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)
"""MADV_NORMAL to MADV_DONTNEED, MADV_FREE and huge pages. With MADV_HWPOISON, root takes memory from processes."""
LONGEST_REASON = 200
NOBODY = 65534
CAPABILITY_VERSION = 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
MAKE_BLOCK_DEVICES = 1 << 11
"""The one right on files that Landlock takes away. What counts is that the process is then in a domain of its own."""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""For each machine, the column of `CALLS` and the kernel's AUDIT_ARCH."""
TIMERS = {"x86_64": (222, 223), "aarch64": (107, 110)}
"""For each machine, the numbers of timer_create and timer_settime."""
CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66), "close": (3, 57),
    "lseek": (8, 62), "dup": (32, 23), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "brk": (12, 214), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "futex": (202, 98), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "time": (201, None),
    "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114), "times": (100, 153),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "getrlimit": (97, 163),
    "getrusage": (98, 165), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
"""Calls that are allowed with any arguments, with their numbers on both architectures."""
GUARDED: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56), "fcntl": (72, 25), "madvise": (28, 233), "prlimit64": (302, 261),
}  # fmt: skip
"""Calls that are allowed with harmless arguments. A filter cannot read those of openat2, which are in memory."""


def main() -> None:
    """Read a request from standard input, run its program, and write its result to standard output.

    The first line of the answer is written before the program runs, so that no program can change it.
    """
    request = json.load(sys.stdin)
    answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    random.seed(0)
    report, code = {}, None
    try:
        confine(request)
        code = compile(request["program"], "program", "exec")
    except Unconfined as error:
        report = {"unconfined": str(error)}
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        report = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]}
    os.write(answer, json.dumps(report).encode() + b"\n")
    if code is not None:
        os.write(answer, (request["token"] + run(code)).encode())
    os._exit(0)  # skips exit handlers of the program


def run(code: types.CodeType) -> str:
    """Run a program as a separate module. Return the kind of the error that ended it; empty if it reached its end."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(code, module.__dict__)
    except BaseException as error:  # SystemExit too: a program that stops early has not passed
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return ""


class Unconfined(Exception):
    """The kernel does not confine the process."""


def confine(request: dict[str, Any]) -> None:
    """Confine the process for good to the calls above, and to the memory and the time that a request names."""
    seconds, memory = request["seconds"], request["memory"]
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise Unconfined(f"seccomp filters are written for {' and '.join(ARCHITECTURES)}, and this is {machine}")
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # SIGXCPU, then SIGKILL if it is ignored
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
    ):
        most = resource.getrlimit(what)[1]
        limits = [limit if most == resource.RLIM_INFINITY else min(limit, most) for limit in (soft, hard)]
        resource.setrlimit(what, (limits[0], limits[1]))
    become_nobody()
    _control(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)  # it had ended before
    _control(PR_SET_NO_NEW_PRIVS, 1)
    leave_other_processes()
    end_after(request["clock"], machine)
    code = filtering(machine)
    instructions = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    _control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program)
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
        except (PermissionError, ValueError):
            continue
        raise Unconfined(f"a confined program could {name}")


def become_nobody() -> None:
    """As root, become the user `nobody`; give up every capability."""
    if os.geteuid() == 0:
        keep_python()
        with contextlib.suppress(OSError):  # a container without this user: its root has no rights outside
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        if not os.access(os.__file__, os.R_OK):
            raise Unconfined(f"the user nobody cannot read {sys.prefix}; run qsim as a user that is not root")
    if LIBC.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)) != 0:
        raise Unconfined(f"capabilities stay: {os.strerror(ctypes.get_errno())}")


def keep_python() -> None:
    """Name Python's directories by descriptors. Another user may not get to them from the root of the file system."""
    names = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in sys.path if os.path.isdir(path)}

    def named(path: str) -> str:
        root = max((root for root in names if path == root or path.startswith(f"{root}/")), key=len, default=None)
        return path if root is None else f"/proc/self/fd/{names[root]}{path[len(root) :]}"

    sys.path[:] = map(named, sys.path)
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = map(named, module.__path__)
        if isinstance(getattr(module, "__file__", None), str):
            module.__file__ = named(module.__file__ or "")


def leave_other_processes() -> None:
    """Enter a domain of Landlock (man 7 landlock), from which the processes outside cannot be read."""
    rights = struct.pack("Q", MAKE_BLOCK_DEVICES)
    rules = LIBC.syscall(ctypes.c_long(LANDLOCK_CREATE_RULESET), rights, ctypes.c_size_t(len(rights)), ctypes.c_long(0))
    if rules >= 0:  # else the kernel has none; what started this process cannot be read in any case
        LIBC.syscall(ctypes.c_long(LANDLOCK_RESTRICT_SELF), ctypes.c_long(rules), ctypes.c_long(0))
        os.close(rules)


def end_after(seconds: int, machine: str) -> None:
    """Let the kernel kill the process when so many seconds have passed by the clock. No program can stop the timer."""
    create, settime = TIMERS[machine]
    event = struct.pack("Qii48x", 0, signal.SIGKILL, 0)
    timer, times = ctypes.c_int(), struct.pack("qqqq", 0, 0, seconds, 0)
    if (
        LIBC.syscall(ctypes.c_long(create), ctypes.c_long(time.CLOCK_MONOTONIC), event, ctypes.byref(timer)) != 0
        or LIBC.syscall(ctypes.c_long(settime), timer, ctypes.c_long(0), times, None) != 0
    ):
        raise Unconfined(f"the kernel refuses a timer: {os.strerror(ctypes.get_errno())}")


def _open_a_socket() -> None:
    if LIBC.socket(1, 1, 0) == -1:
        raise PermissionError


LIBC = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: dict[str, Callable[[], Any]] = {
    "open a socket": _open_a_socket,
    "start a process": lambda: os.fork() or os._exit(0),
    "open a file for writing": lambda: os.open(os.devnull, os.O_WRONLY),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "lift a limit": lambda: resource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU)),
}
"""Attempts that are made in each process before a program runs, and have to fail."""


def filtering(machine: str) -> bytes:
    """Build the filter in BPF, with 8 bytes for each instruction."""
    column, architecture = ARCHITECTURES[machine]
    allow, refuse = _instruction(RETURN, ALLOW), _instruction(RETURN, ERRNO | EPERM)

    def when(number: int, *then: bytes) -> list[bytes]:
        return [_instruction(EQUAL, number, 0, len(then)), *then]

    def low(argument: int) -> bytes:
        return _instruction(LOAD, ARGUMENTS + 8 * argument)

    def high(argument: int) -> bytes:
        return _instruction(LOAD, ARGUMENTS + 8 * argument + 4)

    def one_of(argument: int, harmless: tuple[int, ...]) -> tuple[bytes, ...]:
        return (low(argument), *(part for value in harmless for part in when(value, allow)), refuse)

    unless_writing = (_instruction(ANY_BIT, WRITES, 0, 1), refuse, allow)
    zero = (_instruction(EQUAL, 0, 1, 0), refuse)
    guards = {
        "open": (low(1), *unless_writing),
        "openat": (low(2), *unless_writing),
        "fcntl": one_of(1, HARMLESS_FCNTL),
        "madvise": one_of(2, HARMLESS_ADVICE),
        "prlimit64": (low(0), *zero, low(2), *zero, high(2), *zero, allow),  # may read its own limits
    }
    parts = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(EQUAL, architecture, 1, 0),
        _instruction(RETURN, KILL_PROCESS),
        _instruction(LOAD, NUMBER),
    ]
    for name, numbers in (CALLS | GUARDED).items():
        if (number := numbers[column]) is not None:
            parts += when(number, *guards.get(name, (allow,)))
    return b"".join([*parts, refuse])


def _instruction(code: int, constant: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, constant)


def _control(option: int, value: int, pointed: bytes | None = None) -> None:
    if LIBC.prctl(option, ctypes.c_ulong(value), pointed, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise Unconfined(f"the kernel refuses prctl {option}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
