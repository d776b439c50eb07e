"""The options of a training, and its record."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from qsim_core.evaluation.result import DataRecord, Result
from qsim_core.files import writing


class Training(BaseModel):
    """The options of a training by AdamW. The learning rate rises over 5% of the steps, then falls to 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(None, ge=1, description="optimizer steps; none: as many as the epochs have")
    epochs: float = Field(1.0, gt=0, description="passes over the data, where steps are not given")
    batch_size: int = Field(8, ge=1, description="samples computed at a time")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step")
    learning_rate: float = Field(1e-4, gt=0, description="at its highest")
    rates: tuple[float, ...] = Field(
        (), description="highest learning rates to try; the one with the least loss on held-out data is taken"
    )
    seqlen: int | None = Field(None, description="tokens of a sample; none: what the evaluator takes")
    distill: bool = Field(False, description="learn the float32 model's outputs instead of the data's labels")
    hidden: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the hidden states' relative squared error",
    )
    damping: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="at its highest, weight of the squared distance of weights from the values they are rounded to",
    )
    control: bool = Field(False, description="train in float32, so that what training alone does can be seen")
    seed: int = Field(0, description="of the order of samples and of dropout")
    checkpoint_every: int = Field(100, ge=1, description="steps from one checkpoint to the next")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    bf16: bool = Field(False, description="bfloat16 autocast; weights and their quantization stay float32")


class Logged(BaseModel):
    """One step of a training: the loss of its samples, and the learning rate."""

    step: int
    loss: float
    learning_rate: float


class Finetuned(BaseModel):
    """A training under a recipe: the results before and after it, and the loss of each step."""

    before: Result
    after: Result
    training: Training
    data: DataRecord
    log: list[Logged]
    tried: dict[float, float] = Field(default={}, description="learning rate -> loss on held-out data after its trial")
    left_unfolded: list[str] = Field(default=[], description="weights that --fold had to leave as they are")
    seconds: float = Field(description="of the training itself")

    def write(self, path: Path) -> None:
        """Write JSON to a file, whole or not at all. Raises `QsimError`."""
        with writing(path) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")
