"""Asking about plugins in processes of their own: what a plugin does when it is imported ends that process alone.

A worker imports the core once. For each question it makes a copy of itself (a fork), which answers in JSON, or is
killed after a time limit. Where processes are not copied safely, each question has a worker of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qsim_core.components.hook_validation import HOOKS, base_of
from qsim_core.errors import PluginError

LIMIT = 15.0
"""Seconds for one answer. Plugins are imported in hundredths of a second, after the core and torch."""
START = 120.0
"""Seconds in which a worker that answers one question has to import the core too."""
FORKS = sys.platform == "linux"
WORKER = (
    "import sys; sys.path[:] = sys.argv[1].split('\\n'); from qsim_core.components.plugin_process import work; work()"
)

asked: list[str] = []
"""The functions that this process answers for another one: a worker starts no worker."""

Question = Callable[[dict[str, Any]], Any]


def ask(question: Question, subjects: Sequence[dict[str, Any]], limit: float | None = None) -> list[Any]:
    """Call a function of a module on each subject, in a process each. Subjects and answers are plain data.

    In place of the answer to a question that raises, ends its process or takes too long there is a `PluginError`.
    """
    limit = limit or LIMIT
    name = f"{question.__module__}:{question.__qualname__}"
    if asked or not sys.executable:
        answers = [_answer(question, subject) for subject in subjects]
    elif FORKS:
        answers = _by_worker(name, subjects, limit)
    else:
        answers = [answer for subject in subjects for answer in _by_worker(name, [subject], limit)]
    return [PluginError(answer["fault"]) if "fault" in answer else answer["value"] for answer in answers]


def _by_worker(name: str, subjects: Sequence[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """Start a worker in a group of processes of its own, and end them all when it has answered."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, "\n".join(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        job = {"question": name, "subjects": list(subjects), "limit": limit, "parent": os.getpid()}
        sent = json.dumps(job).encode()
        answers: list[dict[str, Any]] = json.loads(worker.communicate(sent, timeout=START + limit * len(subjects))[0])
    except (ValueError, subprocess.TimeoutExpired, BrokenPipeError):
        return [{"fault": _ending(worker.poll(), limit)} for _ in subjects]
    finally:
        if hasattr(os, "killpg"):
            _end(os.killpg, worker.pid)
        _end(lambda *_: worker.kill(), worker.pid)
        worker.wait()
    return answers


def work() -> None:
    """Answer the questions on standard input; what a plugin prints goes nowhere."""
    gc.disable()  # it ends soon, and collections take a fourth of the time of imports
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    job = json.load(sys.stdin)
    _end_with(job["parent"])
    asked.append(job["question"])
    module, _, function = job["question"].partition(":")
    question: Question = getattr(importlib.import_module(module), function)
    for hook in HOOKS:  # each copy has torch and the base classes, which take most of the time
        base_of(hook)
    with os.fdopen(answers, "wb") as pipe:
        found = [
            _of_copy(question, one, job["limit"], pipe) if FORKS else _answer(question, one) for one in job["subjects"]
        ]
        pipe.write(json.dumps(found).encode())
    os._exit(0)


def _of_copy(question: Question, subject: dict[str, Any], limit: float, answers: Any) -> dict[str, Any]:
    """The answer of a copy of this process, which does not hold the pipe `answers` open."""
    reading, writing = os.pipe()
    worker, copy = os.getpid(), os.fork()
    if copy == 0:
        _end_with(worker)
        os.close(answers.fileno())
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(_answer(question, subject)).encode() + b"\n")
        os._exit(0)
    os.close(writing)
    answer, until = b"", time.monotonic() + limit
    while not answer.endswith(b"\n"):
        ready = select.select([reading], [], [], max(until - time.monotonic(), 0))[0]
        part = os.read(reading, 1 << 16) if ready else b""
        if not part:
            break
        answer += part
    os.close(reading)
    late = time.monotonic() >= until
    if late or answer.endswith(b"\n"):
        _end(os.kill, copy)
    status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    return json.loads(answer) if answer.endswith(b"\n") else {"fault": _ending(None if late else status, limit)}


def _end_with(parent: int) -> None:
    """Have Linux end this process when its parent is killed; `parent` asks it, and may already be gone."""
    if FORKS:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        except PermissionError:  # it lives
            pass


def _answer(question: Question, subject: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": question(subject)}
    except PluginError as error:
        return {"fault": str(error)}
    except BaseException as error:
        return {"fault": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _ending(status: int | None, limit: float) -> str:
    """Say how a process ended that gave no answer; a status of None is one that was not waited for."""
    if status is None:
        return f"it takes more than {limit:.0f} seconds"
    return f"it ends its process, {f'with exit code {status}' if status >= 0 else f'by signal {-status}'}"


def _end(kill: Callable[[int, int], None], process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(process, signal.SIGKILL)
