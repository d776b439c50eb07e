"""`fidelity(inputs, samples)`: compare the outputs of any simulated model with those of the unquantized model."""

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
from qsim_core.evaluation.metrics import Means, rank
from qsim_core.files import place
from qsim_core.transforms.forward import call
from qsim_evaluators.fitting import default_evaluator

OUTPUTS = ("logits", "sample", "last_hidden_state", "image_embeds", "pred_masks")
"""Names of a model's main output, in the order in which they are looked for."""


class Fidelity(Evaluator):
    """Similarity of the simulated model's outputs to those of the unquantized model for the same inputs.

    Outputs are compared as vectors r (unquantized) and x (simulated):

        sqnr_db  10 log₁₀ (Σ r² / Σ (x - r)²)
        cosine   the mean of cos(r, x)
        kl       the mean of KL(softmax r ‖ softmax x) in nats, for logits
        flips    the share of vectors whose largest element has moved, for logits

    A vector is the logits or the states of one position, or a whole image or other output. The unquantized model has no
    error, so its `sqnr_db` is infinite.

    By default, inputs are the calibration batches of the evaluator `inputs`, drawn by the run's seed. From Python, they
    may be `Data` whose content is a list of batches (mappings, tuples, tensors). They may also be a `.safetensors` file
    with the arguments of the model's forward by name, and samples along the first axis.
    """

    name = "fidelity"
    metric = "sqnr_db"
    higher_is_better = True
    inputs: Evaluator | None = Field(None, description="evaluator that makes the inputs; none: the one for this model")
    samples: PositiveInt = Field(64, description="inputs that are drawn")
    positions: PositiveInt = Field(16, description="positions of a sequence to compare, evenly spread up to the last")

    def read(self, source: str, split: str = "test") -> Data:
        """Read tensors from a `.safetensors` file, and other sources with `inputs`."""
        if Path(source).suffix == ".safetensors":
            return _read_tensors(place(source))
        if self.inputs is None:
            raise DataError(
                f"fidelity reads tensors from a .safetensors file; to read {source} name an evaluator, "
                f"like fidelity(perplexity)"
            )
        return self.inputs.read(source, split)

    def default_data(self) -> Data | None:
        """Return the default data of `inputs`, if it has any."""
        return None if self.inputs is None else self.inputs.default_data()

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Return the given batches in their order, or the calibration batches of `inputs`."""
        if isinstance(data.content, list):
            return data.content[:samples]
        return self._inputs(loaded).calibration(loaded, data, samples, length, seed)

    def example(self, loaded: LoadedModel, data: Data) -> Any:
        """Return the first input. Raises `DataError` if the model cannot run on it."""
        if not isinstance(data.content, list):
            return self._inputs(loaded).example(loaded, data)
        try:
            with torch.no_grad():
                call(loaded.model, data.content[0])
        except Exception as error:  # models raise errors of any class
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the model, {type(loaded.model).__name__}, cannot run on {data.name}: {reason}") from error
        return data.content[0]

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `sqnr_db` and `cosine`, for logits also `kl` and `flips`, and the number of output `vectors`."""
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
        """Describe the comparison in words."""
        return f"SQNR of the outputs against those of the model as it is, over {self.samples} inputs at most"

    def _inputs(self, loaded: LoadedModel) -> Evaluator:
        """Return the evaluator that makes the inputs. Raises `DataError` if none is named and none is known."""
        from qsim_evaluators import qsim_evaluators

        name = default_evaluator(loaded)
        if self.inputs is None and name is None:
            raise DataError(
                f"fidelity does not know the inputs of a {type(loaded.model).__name__}; name an evaluator, like "
                f"fidelity(perplexity), or give tensors with --data FILE.safetensors"
            )
        return self.inputs or next(made() for made in qsim_evaluators() if made.name == name)

    def _vectors(self, output: Any) -> tuple[Tensor, bool]:
        """Return an output as vectors `[vectors, width]` in float32 on the CPU, and true if they are logits."""
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
    """Compute signal and error power, and the means of cosine, KL divergence and flips, for one input's vectors."""
    x, r = x.double(), r.double()
    log_r, log_x = r.log_softmax(1), x.log_softmax(1)
    kl = (log_r.exp() * (log_r - log_x)).sum(1)
    first = r.argmax(1)
    flips = (rank(x, first) > rank(r, first)).double()  # of equal logits none is the largest alone
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
        raise DataError(f"{path} should hold tensors with the same number of samples along the first axis, not {sizes}")
    batches = [{name: tensor[i : i + 1] for name, tensor in tensors.items()} for i in range(many.pop())]
    return Data(str(path), batches, digest)
