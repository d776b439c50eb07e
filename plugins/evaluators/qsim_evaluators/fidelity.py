"""`fidelity(inputs, samples)`: how much of a model's own outputs is left, for any model and any input."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.errors import file_did_you_mean
from qsim_core.evaluation.metrics import Means
from qsim_core.transforms.forward import call
from qsim_evaluators.fitting import best

OUTPUTS = ("logits", "sample", "last_hidden_state", "image_embeds", "pred_masks")
"""Where models keep what they are run for, in the order in which they are looked for."""


class Fidelity(Evaluator):
    """What the simulated model gives against what the model as it is gives for the same inputs.

    Over vectors of outputs r (as it is) and x (simulated): `sqnr_db` = 10 log₁₀ (Σ r² / Σ (x - r)²); `cosine`, the mean
    of theirs; and of logits besides `kl`, the mean of KL(softmax r ‖ softmax x) in nats, and `flips`, the share of
    vectors whose largest element is another. A vector is one position's logits or states; an image or another output is
    one. The model against itself has no error: an infinite `sqnr_db`.

    Inputs are those that the evaluator `inputs` would calibrate on, drawn by the run's seed; or, from Python, `Data`
    whose content is a list of batches (mappings, tuples, tensors); or a `.safetensors` file with the forward's
    arguments by name, samples along the first axis.
    """

    name = "fidelity"
    metric = "sqnr_db"
    higher_is_better = True
    inputs: Evaluator | None = Field(None, description="the evaluator whose inputs are used; none: the one that fits")
    samples: PositiveInt = Field(64, description="inputs that are drawn")
    positions: PositiveInt = Field(16, description="of a sequence that are compared, evenly spread, the last one too")

    def read(self, source: str, split: str = "test") -> Data:
        """Tensors from a `.safetensors` file, else what `inputs` reads."""
        if Path(source).suffix == ".safetensors":
            return _read_tensors(Path(source).expanduser())
        if self.inputs is None:
            raise DataError(
                f"fidelity reads tensors from a .safetensors file; for {source} say whose data it is, "
                f"like fidelity(perplexity)"
            )
        return self.inputs.read(source, split)

    def default_data(self) -> Data | None:
        """What `inputs` needs no file for."""
        return None if self.inputs is None else self.inputs.default_data()

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """The given batches in their order, or those of `inputs`."""
        if isinstance(data.content, list):
            return data.content[:samples]
        return self._inputs(loaded).calibration(loaded, data, samples, length, seed)

    def example(self, loaded: LoadedModel, data: Data) -> Any:
        """The first input. Raises `DataError` if the model cannot run on what was given."""
        if not isinstance(data.content, list):
            return self._inputs(loaded).example(loaded, data)
        try:
            with torch.no_grad():
                call(loaded.model, data.content[0])
        except Exception as error:  # a model raises whatever it meets first
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the model, {type(loaded.model).__name__}, cannot run on {data.name}: {reason}") from error
        return data.content[0]

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """`sqnr_db`, `cosine`, of logits `kl` and `flips`, and the number of output `vectors`."""
        batches = self.calibration(loaded, data, min(self.samples, run.limit or self.samples), None, run.seed)
        outputs = []
        with torch.no_grad():
            for batch in run.track(batches, len(batches), "inputs"):
                outputs.append(self._vectors(call(loaded.model, batch)))
        exact = outputs if run.reference is None else run.reference
        rows = [_compare(x, r) for (x, _), (r, _) in zip(outputs, exact, strict=True)]
        names = ("signal", "error", "cosine", "kl", "flips")
        samples = dict(zip(names, torch.tensor(rows, dtype=torch.float64).unbind(1), strict=True))
        logits = all(are for _, are in outputs)

        def metrics(means: Means) -> Means:
            kept = {"sqnr_db": 10 * (means["signal"] / means["error"]).log10(), "cosine": means["cosine"]}
            return kept | ({"kl": means["kl"], "flips": means["flips"]} if logits else {})

        return Metrics(samples, metrics, counts={"vectors": float(sum(len(x) for x, _ in outputs))}, outputs=outputs)

    def protocol(self, loaded: LoadedModel) -> str:
        """The comparison in words."""
        return f"SQNR of the outputs against those of the model as it is, over {self.samples} inputs at most"

    def _inputs(self, loaded: LoadedModel) -> Evaluator:
        """The evaluator whose inputs are used. Raises `DataError` if none is named and none known to fit."""
        from qsim_evaluators import qsim_evaluators

        name = best(loaded)
        if self.inputs is None and name is None:
            raise DataError(
                f"fidelity does not know what a {type(loaded.model).__name__} takes; say whose inputs, like "
                f"fidelity(perplexity), or give tensors with --data FILE.safetensors"
            )
        return self.inputs or next(made() for made in qsim_evaluators() if made.name == name)

    def _vectors(self, output: Any) -> tuple[Tensor, bool]:
        """`[vectors, width]` in float32 on the CPU, and whether they are logits."""
        name = next((name for name in OUTPUTS if getattr(output, name, None) is not None), None)
        found = output if name is None else getattr(output, name)
        found = found[0] if isinstance(found, tuple | list) else found
        if not isinstance(found, Tensor):
            raise DataError(f"fidelity finds no tensor in a {type(output).__name__}; it looks for {', '.join(OUTPUTS)}")
        if found.dim() == 3:
            places = torch.linspace(0, found.shape[1] - 1, min(self.positions, found.shape[1])).round().long()
            found = found[:, places].flatten(0, 1)
        return found.float().cpu().flatten(1), name == "logits"


def _compare(x: Tensor, r: Tensor) -> tuple[float, ...]:
    """Signal and error power, and the means of cosine, KL divergence and flips, of one input's vectors."""
    x, r = x.double(), r.double()
    log_r, log_x = r.log_softmax(1), x.log_softmax(1)
    kl = (log_r.exp() * (log_r - log_x)).sum(1)
    flips = (x.argmax(1) != r.argmax(1)).double()
    cosine = F.cosine_similarity(x, r, dim=1)
    return tuple(
        float(value) for value in (r.square().sum(), (x - r).square().sum(), cosine.mean(), kl.mean(), flips.mean())
    )


def _read_tensors(path: Path) -> Data:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {why}{file_did_you_mean(path)}") from None
    many = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(many) != 1 or 0 in many:
        sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise DataError(f"{path} should hold arguments with as many samples each along the first axis, not {sizes}")
    batches = [{name: tensor[i : i + 1] for name, tensor in tensors.items()} for i in range(many.pop())]
    return Data(str(path), batches, digest)
