"""The data that a model is trained on, and the data that it is measured on."""

from __future__ import annotations

from qsim_core.errors import DataError
from qsim_core.evaluation.data import Data
from qsim_core.evaluation.job import Job
from qsim_core.files import place


def training_data(job: Job, source: str | None) -> Data:
    """The data that the model is trained on. Raises `DataError` if none are named and the model has none."""
    if source is not None:
        return job.evaluator.read(source, split="train")
    if job.located.calibration is None:
        raise DataError(f"{job.located.name} comes without data to train on; name some with --data")
    return job.located.calibration()


def measured_on(job: Job, data: str | None, eval_data: str | None) -> str | None:
    """The data that the model is measured on, as `--data` of an evaluation; none: the model's own."""
    trained = job.located.trained
    if eval_data is None and trained is not None:
        eval_data = trained.data
    if eval_data is not None or job.located.data is not None or job.evaluator.default_data() is not None:
        return eval_data
    if data is None or place(data).is_file() or data.count(":") > 1:
        raise DataError(f"{job.located.name} has nothing to be measured on but what it trains on; name --eval-data")
    return data  # the evaluator reads the test split
