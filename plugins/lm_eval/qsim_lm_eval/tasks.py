"""Tasks of the harness: find them by name, load them with their documents, and compute their fingerprint."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from qsim_core import Data, DataError
from qsim_core.errors import did_you_mean

LESS = 1e-12
"""The share of its log-likelihood by which a right choice is lowered."""


@dataclass
class Tasks:
    """Tasks with their documents by name, and the groups over which they are averaged."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    first_text: str
    """The first request of the first task."""

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Seed all random numbers of the harness in the `with` block, so that each model gets the same examples.

        The harness draws from global generators. Their states are restored afterwards.
        """
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng():
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
                for task in self.tasks.values():
                    task.set_fewshot_seed(seed)
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    @contextmanager
    def right_choices_last(self) -> Iterator[None]:
        """Inside, a right choice ranks after those that are as likely. The harness takes the first of them."""
        several = (task for task in self.tasks.values() if task.OUTPUT_TYPE == "multiple_choice")
        asked = [task for task in several if task.config.doc_to_target is not None]
        try:
            for task in asked:
                task.process_results = partial(_scored, task, task.process_results)
            yield
        finally:
            for task in asked:
                vars(task).pop("process_results", None)


def _scored(task: Any, score: Callable[..., Any], doc: Any, answers: list[tuple[float, bool]]) -> Any:
    """Score the answers to a document; each right choice has become less likely by `LESS`."""
    found, choices = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc), task.doc_to_choice(doc)
    right = [choices.index(one) if one in choices else one for one in (found if isinstance(found, list) else [found])]
    lower = [x - LESS * max(1.0, abs(x)) if place in right else x for place, (x, *_) in enumerate(answers)]
    return score(doc, [(x, *rest) for x, (_, *rest) in zip(lower, answers, strict=True)])


def load(names: tuple[str, ...], num_fewshot: int | None, include_path: Path | None) -> Data:
    """Load the named tasks as `Data`, with a hash of their documents and first requests. Raises `DataError`."""
    manager, found = _find(names, include_path)
    try:
        loaded = manager.load(found)
    except Exception as error:  # data sets, their loaders and tasks raise errors of any class
        raise DataError(f"lm_eval cannot load {', '.join(names)}: {_in_one_line(error)}") from None
    digest, parts, first = hashlib.sha256(), [], ""
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(f"{name} runs code that the model has written; lm_eval does not run such tasks")
        shots = _show(task, num_fewshot)
        try:
            requests, documents = _first_requests(task), list(task.eval_docs)
        except Exception as error:  # a template or function may not fit the documents
            raise DataError(f"lm_eval cannot ask {name}: {_in_one_line(error)}") from None
        first = first or "".join(part for part in requests[0] if isinstance(part, str))
        known = [name, task.VERSION, shots, requests, documents]
        digest.update(json.dumps(known, default=handle_non_serializable).encode())
        parts.append(f"{name} (version {task.VERSION}, {shots}-shot)")
    content = Tasks(loaded["tasks"], loaded.get("groups", {}), first)
    return Data(", ".join(parts), content, digest.hexdigest())


def _find(names: tuple[str, ...], include_path: Path | None) -> tuple[TaskManager, list[str]]:
    """Return an index of tasks that contains all names, and the tasks that match the names and patterns."""
    if include_path is not None and not include_path.is_dir():
        raise DataError(f"lm_eval finds no directory {include_path}")
    # the harness's own thousands of tasks take seconds to read, so they are read only if needed
    for with_its_own in [True] if include_path is None else [False, True]:
        manager = TaskManager(include_path=include_path, include_defaults=with_its_own)
        matches = {name: manager.match_tasks([name]) for name in names}
        if all(matches.values()):
            return manager, list(dict.fromkeys(match for found in matches.values() for match in found))
    missing = next(name for name in names if not matches[name])
    raise DataError(f"lm_eval has no task {missing!r}{did_you_mean(missing, manager.all_tasks)}")


def _show(task: Any, num_fewshot: int | None) -> int:
    """Set and return a task's number of examples: `num_fewshot`, unless the task itself defines 0."""
    own = task.get_config("num_fewshot")
    shots = (own or 0) if num_fewshot is None or own == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    return int(shots)


def _first_requests(task: Any) -> list[Any]:
    """Return the requests of the first document."""
    task.set_fewshot_seed(0)
    task.build_all_requests(limit=1)
    return [request.args for request in task.instances]


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
