"""A Python that starts at once: each program runs in a fork of one process that has imported torch and transformers.

It knows what the installed plugins offer, also where the cache is empty.

`[*forked.python(), "-m", "qsim_core", "plugins"]` is a command like `[sys.executable, …]`, with its own directory,
environment, standard streams, exit code, and Ctrl-C. Tests of what is imported, of limits of a process, and of kills
need a Python of their own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

LIBRARIES = [
    "torch._dynamo",
    "torch.distributed.tensor",
    "sklearn.cluster",
    "transformers.models.opt.modeling_opt",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.tokenization_gpt2",
    "qsim_core.cli.evaluate",
    "qsim_core.cli.result_table",
]
"""The imports before any fork. No plugin of qsim is among them: a program finds and loads them itself."""
ENVIRONMENT = dict(os.environ)
"""The environment before any test has changed it: libraries read it when they are imported."""
SMALL = 65536
"""Bytes of the largest message."""

started: list[str] = []


def python() -> list[str]:
    """Return the beginning of a command line. The first call starts the process that is forked."""
    import atexit
    import shutil
    import subprocess
    import tempfile

    if not started:
        folder = tempfile.mkdtemp()
        started.append(os.path.join(folder, "socket"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        server = subprocess.Popen([sys.executable, __file__, "serve", started[0]], env=ENVIRONMENT, **pipes)  # type: ignore[call-overload]
        assert server.stdout.read(1) == b"!"
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(server.communicate)  # closes its input, at which it ends
    return [sys.executable, "-I", "-S", __file__, *started]


def executable() -> str:
    """Return the path of a program that does the same as `[*python(), …]`, to stand for `sys.executable`."""
    import shlex

    command = python()
    path = os.path.join(os.path.dirname(started[0]), "python")
    if not os.path.exists(path):
        with open(path, "x") as file:
            file.write(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        os.chmod(path, 0o700)
    return path


def ask(path: str, arguments: list[str]) -> int:
    """Have a fork run a program with this process's streams, directory and environment; return its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    said = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    assert len(said) < SMALL, "the arguments and the environment are too long"
    socket.send_fds(connection, [said], [0, 1, 2])
    process = int(connection.recv(SMALL))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process, number))
    code = os.waitstatus_to_exitcode(int(connection.recv(SMALL)))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(path: str) -> list[str]:
    """Fork for every program that is asked for. Return, in such a fork alone, the program's arguments."""
    import select

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"!")
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        said, streams, _, _ = socket.recv_fds(connection, SMALL, 3)
        process = os.fork()
        if process:
            connection.send(str(process).encode())
            connection.send(str(os.waitpid(process, 0)[1]).encode())
            os._exit(0)
        connection.close()
        arguments, directory, environment = json.loads(said)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        return list(arguments)
    os._exit(0)


def finish(arguments: list[str]) -> None:
    """Run a program and end this process, without taking the libraries apart: that takes two seconds."""
    import atexit
    import threading
    import traceback

    code: object = None
    try:
        begin(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    sys.stderr.flush()
    os._exit(code or 0)


def begin(arguments: list[str]) -> None:
    """Run a program as the interpreter does, `[-W FILTER] -c TEXT …` or `[-W FILTER] -m MODULE …`."""
    import runpy
    import warnings

    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for number, name in enumerate(["stdin", "stdout", "stderr"]):
        options = {"encoding": encoding or None, "errors": errors or ("backslashreplace" if number == 2 else None)}
        by_line = {"buffering": 1} if number == 2 or os.isatty(number) else {}
        mode = "w" if number else "r"
        stream = open(number, mode, closefd=False, **options, **by_line)  # type: ignore[call-overload]  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if place and place not in sys.path:
            sys.path.insert(1, place)
    if arguments[0] == "-W":
        warnings._setoption(arguments[1])  # type: ignore[attr-defined]
        arguments = arguments[2:]
    kind, what, *rest = arguments
    sys.argv[:] = [kind, *rest]
    sys.path[0] = os.getcwd() if kind == "-m" else ""
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        program = type(sys)("__main__")
        sys.modules["__main__"] = program
        exec(compile(what, "<string>", "exec"), vars(program))


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    import contextlib
    import gc
    import importlib

    gc.disable()
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    from qsim_core.components.host import Host

    Host().offers()
    gc.freeze()
    gc.enable()
    finish(serve(sys.argv[2]))
