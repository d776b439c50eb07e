"""Training towards the float32 model's outputs instead of the data's labels. Importing this imports transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.errors import TrainingError
from qsim_finetune.saving import SavingTrainer

LABELS = frozenset({"labels", "start_positions", "end_positions"})
"""Names of inputs from which a model computes its own loss."""


class DistillationTrainer(SavingTrainer):
    """transformers' `Trainer` with the distance from `teacher`, which takes the same inputs, as its loss.

    `distance` says what it is for logits, for the ends of an answer, and for what a denoiser predicts. The teacher has
    no dropout, and no gradient; labels are not looked at. Hinton et al., arXiv 1503.02531, at
    temperature 1; for quantized models Polino et al., arXiv 1802.05668, and Liu et al., arXiv 2305.17888. `hidden`
    times the error of the hidden states is added, as in Jiao et al., arXiv 1909.10351.
    """

    def __init__(self, *args: Any, teacher: nn.Module, hidden: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden = hidden
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.model_accepts_loss_kwargs = False  # a mean over the batch, for the Trainer to divide among several
        self.label_names: list[str] = []  # samples without labels are evaluated too
        self.can_return_loss = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch. Raises `TrainingError` where there are no logits, or no hidden states."""
        given = {name: value for name, value in inputs.items() if name not in LABELS}
        asked = {"output_hidden_states": True} if self.hidden else {}
        with torch.no_grad():
            taught = self.teacher(**given, **asked)
        outputs, mask = model(**given, **asked), given.get("attention_mask")
        loss = distance(outputs, taught, mask)
        if self.hidden:
            loss = loss + self.hidden * hidden_error(_states(outputs), _states(taught), mask)
        return (loss, outputs) if return_outputs else loss


def divergence(logits: Tensor, taught: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(softmax `taught` ‖ softmax `logits`) in nats, computed in float32: the mean over all but the last axis.

    Of sequences [samples, positions, classes] a mask [samples, positions] leaves out those that are 0.
    """
    log_q, log_p = logits.float().log_softmax(-1), taught.float().log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return each.mean() if mask is None or mask.shape != each.shape else each[mask != 0].mean()


def hidden_error(states: Sequence[Tensor], taught: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """|h - `taught`|² / |`taught`|² of hidden states h [samples, positions, channels]: the mean over all layers.

    A mask [samples, positions] leaves out positions that are 0.
    """
    errors = []
    for mine, wanted in zip(states, taught, strict=True):
        kept = ... if mask is None or mask.shape != mine.shape[:2] else mask != 0
        one, other = mine[kept].float(), wanted[kept].float()
        errors.append((one - other).square().sum() / other.square().sum())
    return torch.stack(errors).mean()


def _states(outputs: Any) -> Sequence[Tensor]:
    states: Sequence[Tensor] | None = getattr(outputs, "hidden_states", None)
    if not states:
        raise TrainingError(f"the model gives a {type(outputs).__name__} without hidden states; leave --hidden out")
    return states


def distance(outputs: Any, taught: Any, mask: Tensor | None = None) -> Tensor:
    """The distance of a model's outputs from a teacher's.

    It is the `divergence` of `logits`. For question answering it is the mean of those of `start_logits` and
    `end_logits`, over the tokens. Of a denoiser's `sample` it is |x - x*|² / |x*|², where x* is the teacher's. Raises
    `TrainingError` if there is none of them.
    """
    for names in (("logits",), ("start_logits", "end_logits")):
        pairs = [(getattr(outputs, name, None), getattr(taught, name, None)) for name in names]
        if all(isinstance(part, Tensor) for pair in pairs for part in pair):
            return torch.stack([divergence(mine, wanted, mask) for mine, wanted in pairs]).mean()  # type: ignore[arg-type]
    mine, wanted = getattr(outputs, "sample", None), getattr(taught, "sample", None)
    if isinstance(mine, Tensor) and isinstance(wanted, Tensor):
        return hidden_error([mine], [wanted])
    raise TrainingError(f"the model gives a {type(outputs).__name__} without logits to learn; leave --distill out")
