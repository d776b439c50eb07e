"""`lm_eval(tasks, num_fewshot, …)`: tasks of EleutherAI's harness, run on the model in memory."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from qsim_transformers.tokens import check_ids

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.errors import with_article
from qsim_core.evaluation.metrics import finite_outputs
from qsim_core.transforms.offload import computes_on
from qsim_lm_eval.quiet import quiet

if TYPE_CHECKING:
    from qsim_lm_eval.tasks import Tasks

FITTING = ("ForCausalLM", "LMHeadModel")
"""Endings of the class names of models that the harness can evaluate."""


class LMEval(Evaluator):
    """Tasks of the Language Model Evaluation Harness (Gao et al., zenodo 10256836), scored by the harness.

    A metric has the harness's name with its task in front, `piqa/acc_norm`, and its filter at the end if the task has
    several. Metrics that are means over documents have confidence intervals, as have the harness's perplexities of such
    means. Metrics of a whole corpus (F1, BLEU) have none. Log-probabilities are computed in float32. `limit` takes the
    first documents of every task, `batch_size` counts requests, and `seed` draws the examples in prompts.
    """

    name = "lm_eval"
    tasks: tuple[str, ...] = Field(description="tasks, groups or tags of the harness, or patterns like mmlu_*")
    num_fewshot: NonNegativeInt | None = Field(None, description="examples in a prompt; none: the task's own number")
    include_path: Path | None = Field(None, description="a directory with more tasks, in the harness's YAML")
    max_length: PositiveInt | None = Field(None, description="tokens of an input at most; none: the model's maximum")
    inputs: Evaluator = Field("perplexity", description="evaluator that makes calibration batches")  # type: ignore[assignment]

    @field_validator("tasks", mode="before")
    @classmethod
    def _separate(cls, value: Any) -> Any:
        """Split `"piqa,arc_easy"` into two tasks, as the harness's own command does."""
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _any(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value) or not value:
            raise ValueError("name a task, as in lm_eval([piqa, arc_easy])")
        return value

    @field_validator("include_path")
    @classmethod
    def _from_anywhere(cls, value: Path | None) -> Path | None:
        """Make the path absolute, so that a record of a run does not depend on the working directory."""
        return None if value is None else value.expanduser().resolve()

    def read(self, source: str, split: str = "test") -> Data:
        """Read calibration data with `inputs`. The tasks have their own documents."""
        return self.inputs.read(source, split)

    def default_data(self) -> Data:
        """Load the tasks with their documents. The name lists versions and numbers of examples. Raises `DataError`."""
        from qsim_lm_eval.tasks import load

        with quiet():
            return load(self.tasks, self.num_fewshot, self.include_path)

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Make batches of text with `inputs`. The tasks' own documents are never used for calibration."""
        from qsim_lm_eval.tasks import Tasks

        if isinstance(data.content, Tasks):
            raise DataError("lm_eval's tasks cannot be used for calibration; name a text with --calibration-data")
        return self.inputs.calibration(loaded, data, samples, length, seed)

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the tokens of the first request."""
        self._check(loaded)
        tokens = loaded.tokenizer(_tasks(data).first_text, verbose=False).input_ids or [loaded.tokenizer.eos_token_id]
        ids = check_ids(loaded.model, torch.tensor([tokens[: self.max_length or 64]]))
        return {"input_ids": ids.to(computes_on(loaded.model)), "use_cache": False}

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Return the harness's metrics as `task/metric`, those of groups first, and the number of `documents`."""
        self._check(loaded)
        tasks = _tasks(data)
        with quiet():
            import lm_eval

            from qsim_lm_eval.language_model import InMemory
            from qsim_lm_eval.scores import score

            try:
                with tasks.seeded(run.seed), tasks.right_choices_last(), finite_outputs(loaded.model) as finite:
                    results = lm_eval.evaluate(
                        InMemory(loaded, run, self.max_length),
                        {"tasks": tasks.tasks, "groups": tasks.groups},
                        limit=run.limit,
                        bootstrap_iters=0,
                    )
            except (AssertionError, ValueError) as error:  # the harness refuses a request with these
                raise DataError(f"lm-evaluation-harness: {' '.join(str(error).split())[:300]}") from None
            return score(results, tasks, finite())

    def protocol(self, loaded: LoadedModel) -> str:
        """Name the harness's version and the limit on the length of inputs."""
        length = "" if self.max_length is None else f", inputs of {self.max_length} tokens at most"
        return f"lm-evaluation-harness {version('lm-eval')}{length}"

    def _check(self, loaded: LoadedModel) -> None:
        """Raise `DataError` for a model or tokenizer that the harness cannot evaluate."""
        model = type(loaded.model).__name__
        if not model.endswith(FITTING):
            raise DataError(f"lm_eval needs a causal language model of transformers, not {with_article(model)}")
        if getattr(loaded.tokenizer, "eos_token_id", None) is None:
            raise DataError(f"lm_eval needs a tokenizer with an end-of-text token, and this {model} has none")


def _tasks(data: Data) -> Tasks:
    from qsim_lm_eval.tasks import Tasks

    if not isinstance(data.content, Tasks):
        raise DataError("lm_eval's tasks have their own documents; leave --data out")
    return data.content
