"""`pass_at_k(k, samples)`: share of programming problems that a model solves in k attempts (HumanEval)."""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, QsimError, Run
from qsim_core.evaluation.metrics import finite_outputs
from qsim_core.files import place
from qsim_evaluators import sandbox
from qsim_evaluators.asking import arguments
from qsim_evaluators.completing import STOPS, Sampling, complete
from qsim_evaluators.fitting import check, device, longest
from qsim_evaluators.text import draw_windows, holds_lines, opened, read_lines, read_rows, split_opening, tokens_of

LONGEST = 2048
NEEDED = ("prompt", "test", "entry_point")
OPTIONAL = ("task_id", "canonical_solution")


class PassAtK(Evaluator):
    """The chance that one of k programs passes a problem's tests (Chen et al., arXiv 2107.03374, eq. 1).

    The model completes `prompt` `samples` times. Each completion ends before the first of `stop`. The program is
    `prompt + completion + test`, followed by `check(entry_point)`. It passes if it reaches its end. If c of n samples
    pass, `pass@k` is the mean over problems of 1 - C(n - c, k) / C(n, k).

    The evaluator needs `Run.allow_code_execution`, and runs programs only in `sandbox`. Random numbers depend on the
    run's seed, the problem, the sample and the token. So they are the same for the unquantized and the simulated model.

    Data are a mapping with `prompt`, `test` and `entry_point`, and optionally `task_id` and `canonical_solution`. Each
    is a list of texts.
    """

    name = "pass_at_k"
    metric = "pass@1"
    higher_is_better = True
    k: tuple[PositiveInt, ...] = Field((1, 10), description="numbers of attempts to solve a problem; 1 is always added")
    samples: PositiveInt = Field(20, description="completions of each problem")
    temperature: NonNegativeFloat = Field(0.2, description="temperature of sampling; 0 takes the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="tokens are drawn from the likeliest with this probability")
    max_new_tokens: PositiveInt = Field(512, description="tokens of a completion at most")
    stop: tuple[str, ...] = Field(STOPS, description="texts before which a completion ends")
    timeout: PositiveInt = Field(3, description="seconds of processor time of a program; wall-clock time is four times")

    @model_validator(mode="after")
    def _fits(self) -> PassAtK:
        if max(self.k, default=1) > self.samples:
            raise ValueError(f"pass@{max(self.k)} takes {max(self.k)} samples of a problem, not {self.samples}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"at temperature=0 all {self.samples} samples are equal; set samples=1 and k=[1]")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every completion at once")
        return self

    def read(self, source: str, split: str = "test") -> Data:
        """Read problems from a file of rows, from JSON lines (also `.gz`), or from `datasets`."""
        path = place(source)
        if holds_lines(path):
            return problems(source, read_lines(path))
        rows = read_rows(source, list(NEEDED), split)
        return problems(source, [dict(row) for row in rows])

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw windows at random places of all prompts with their canonical solutions, joined by blank lines."""
        most = longest(loaded, LONGEST)
        length = length or most
        if length > most:
            raise DataError(f"calibration windows of {length} tokens: the model takes {most} at most")
        content = self._content(loaded, data)
        texts = [p + s for p, s in zip(content["prompt"], content["canonical_solution"], strict=True)]
        opening, tokens = split_opening(loaded, tokens_of(loaded, "\n\n".join(texts)))
        windows = draw_windows(tokens, samples, length - len(opening), seed, data.name)
        return [_inputs(loaded, opened(opening, window)) for window in windows]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first prompt."""
        tokens = tokens_of(loaded, self._content(loaded, data)["prompt"][0])
        return _inputs(loaded, tokens.unsqueeze(0))

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `pass@k` for each k, and the number of `problems`. `outputs` has completions and verdicts."""
        if not run.allow_code_execution:
            raise QsimError(
                "pass_at_k runs programs that the model writes; allow it with --allow-code-execution "
                "(in Python: Run(allow_code_execution=True))"
            )
        sandbox.check()
        content = self._content(loaded, data)
        places = list(range(len(content["prompt"])))[: run.limit]
        prompts = [tokens_of(loaded, content["prompt"][place]) for place in places]
        self._check_lengths(loaded, content, prompts)
        sampling = Sampling(self.temperature, self.top_p, self.max_new_tokens, self.stop, run.seed)
        passed, outputs = [], []
        with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for place in run.track(places, len(places), "problems"):
                with finite_outputs(loaded.model) as finite:
                    written = complete(
                        loaded, prompts[place], self.samples, sampling, f"problem {place}", run.batch_size
                    )
                programs = [self._program(content, place, completion) for completion in written]
                verdicts = list(pool.map(lambda program: sandbox.run(program, self.timeout), programs))
                passed.append(verdicts.count(sandbox.PASSED) if finite() else None)
                outputs += [
                    {"task_id": content["task_id"][place], "completion": completion, "verdict": verdict}
                    for completion, verdict in zip(written, verdicts, strict=True)
                ]
        estimates = {
            f"pass@{k}": torch.tensor([math.nan if c is None else estimate(self.samples, c, k) for c in passed])
            for k in sorted({1, *self.k})
        }
        return Metrics(estimates, counts={"problems": float(len(places))}, outputs=outputs)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe sampling, stops and the estimate in words."""
        if self.temperature == 0:
            drawn = "the greedy completion of each prompt as it is"
        else:
            nucleus = f"temperature {self.temperature:g} and top-p {self.top_p:g}"
            drawn = f"{self.samples} completions of each prompt as it is at {nucleus}"
        stops = ", ".join(json.dumps(stop, ensure_ascii=False) for stop in self.stop) or "nothing"
        return (
            f"unbiased pass@k (arXiv 2107.03374, eq. 1) over {drawn}, of {self.max_new_tokens} tokens at most, cut at "
            f"{stops}; {self.timeout} s of processor time for each program"
        )

    def save_samples(self, baseline: Any, simulated: Any, directory: Path) -> None:
        """Write `task_id`, `completion` and `verdict` of each sample to `baseline.jsonl` and `simulated.jsonl`."""
        for name, outputs in (("baseline", baseline), ("simulated", simulated)):
            text = "".join(json.dumps(output) + "\n" for output in outputs)
            (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")

    @staticmethod
    def _program(content: Any, place: int, completion: str) -> str:
        prompt, test, entry_point = (content[column][place] for column in NEEDED)
        return f"{prompt}{completion}\n{test}\ncheck({entry_point})\n"

    def _content(self, loaded: LoadedModel, data: Data) -> dict[str, list[str]]:
        check(self.name, loaded)
        if not hasattr(loaded.tokenizer, "decode"):
            raise DataError(f"{self.name} reads what the model writes: give the model a tokenizer that can decode")
        if not isinstance(data.content, dict) or not all(data.content.get(column) for column in NEEDED):
            raise DataError(f"{data.name} has no programming problems; name a file of them with --data")
        return {column: data.content.get(column, [""] * len(data.content["prompt"])) for column in NEEDED + OPTIONAL}

    def _check_lengths(self, loaded: LoadedModel, content: dict[str, list[str]], prompts: list[torch.Tensor]) -> None:
        """Raise `DataError` before the first completion if the longest prompt and its completion do not fit."""
        most, place = longest(loaded, LONGEST), max(range(len(prompts)), key=lambda place: len(prompts[place]))
        if (length := len(prompts[place])) + self.max_new_tokens > most:
            raise DataError(
                f"the model takes {most} tokens at most, not {length} of {content['task_id'][place] or 'a prompt'} "
                f"and max_new_tokens={self.max_new_tokens}"
            )


def _inputs(loaded: LoadedModel, tokens: torch.Tensor) -> dict[str, Any]:
    return arguments(loaded, {"input_ids": tokens.to(device(loaded)), "use_cache": False})


def estimate(n: int, c: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    This is the unbiased estimate of the chance that one of k samples passes, if c of n have passed. It is computed as
    1 - Π (1 - k / i) over i from n - c + 1 to n, so that no factor is large.
    """
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def problems(name: str, rows: list[dict[str, Any]]) -> Data:
    """Make data of problems, with the SHA-256 of their JSON. Raises `DataError` if a problem lacks a needed text."""
    if not rows:
        raise DataError(f"{name} has no problems")
    for number, row in enumerate(rows, 1):
        for column in NEEDED:
            if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
                raise DataError(f"{name}, problem {number}: a problem needs the text {column!r}")
    content = {column: [row[column] for row in rows] for column in NEEDED}
    content |= {column: [str(row.get(column) or "") for row in rows] for column in OPTIONAL}
    return Data(name, content, hashlib.sha256(json.dumps(content).encode()).hexdigest())
