"""`clip_score(clip, steps, guidance)`: similarity of a pipeline's images to the texts from which they were made."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.errors import with_article
from qsim_core.files import place
from qsim_evaluators.features import load_given
from qsim_evaluators.fitting import device
from qsim_evaluators.pictures import as_bytes, write_side_by_side
from qsim_evaluators.pixels import pixels
from qsim_evaluators.prompts import FromTexts
from qsim_evaluators.text import ROWS, read_file, read_rows

WEIGHT = 100
"""The factor of the cosine: 100, as in torchmetrics; the paper takes 2.5."""


class ClipScore(Evaluator):
    """CLIPScore of text-to-image pipelines (arXiv 2104.08718): 100 max(cos(image, text), 0), the mean over prompts.

    A given CLIP embeds both, and is never quantized. Choose a CLIP that is not part of the pipeline. Each prompt has
    its own noise, drawn by the run's seed, which is the same for the unquantized and the simulated pipeline. Data are
    a list of prompts.
    """

    name = "clip_score"
    metric = "clip_score"
    higher_is_better = True
    clip: str = Field(description="the CLIP that compares images and texts: a directory, or a name on the hub")
    steps: PositiveInt = Field(25, description="steps from noise to image")
    guidance: float | None = Field(None, description="scale of classifier-free guidance; none: the pipeline's own")
    column: str = Field("text", description="the column with prompts")

    def read(self, source: str, split: str = "test") -> Data:
        """Read prompts: the lines of a text file, or a column of a file of rows or of `NAME[:CONFIG[:SPLIT]]`."""
        path = place(source)
        plain = path.is_file() and path.suffix not in ROWS
        found = (
            read_file(path).splitlines() if plain else map(str, read_rows(source, [self.column], split)[self.column])
        )
        prompts = [text.strip() for text in found if text.strip()]
        if not prompts:
            raise DataError(f"{source} is empty: there is no prompt to make an image of")
        return Data(source, prompts, Data.of_text(source, "\n".join(prompts)).sha256)

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first prompt, with few steps."""
        return self._made().example(loaded, data.content)

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw prompts and their noise, each for a run of all steps."""
        return list(self._made().calibration(loaded, data.content, samples, length, seed))

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `clip_score`, which is NaN if an image is not finite, and the number of `prompts`."""
        prompts = data.content[: run.limit]
        judge = _Judge(self.clip, device(loaded))
        images, scores, texts = [], [], iter(prompts)
        for made in self._made().images(loaded, prompts, run):
            images.append(as_bytes(made))
            with torch.no_grad():
                cosine = judge.cosine(images[-1], list(islice(texts, len(made))))
            scores.append(cosine.where(made.flatten(1).isfinite().all(1), torch.nan))
        samples = {self.metric: WEIGHT * torch.cat(scores).clamp(min=0)}
        return Metrics(samples, counts={"prompts": float(len(prompts))}, outputs=torch.cat(images))

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the CLIP, the steps and the guidance in words."""
        guidance = "the pipeline's own guidance" if self.guidance is None else f"guidance {self.guidance:g}"
        return (
            f"CLIPScore, {WEIGHT} max(cos, 0) by {self.clip}, one image for each prompt, {self.steps} steps, {guidance}"
        )

    def save_samples(self, baseline: Tensor, simulated: Tensor, directory: Path) -> None:
        """Write `samples.png`: the baseline's images on the left, those of the simulated model on the right."""
        write_side_by_side(baseline, simulated, directory / "samples.png")

    def _made(self) -> FromTexts:
        return FromTexts(self.name, self.steps, self.guidance)


class _Judge:
    """A CLIP with its processor and its tokenizer."""

    def __init__(self, name: str, where: torch.device) -> None:
        self.loaded = load_given(name, where)
        self.model: Any = self.loaded.model
        both = hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")
        if not both or self.loaded.processor is None or self.loaded.tokenizer is None:
            raise DataError(f"{name}, {with_article(type(self.model).__name__)}, does not embed both images and texts")

    def cosine(self, images: Tensor, texts: list[str]) -> Tensor:
        """Compute the cosine of each uint8 image `[images, 3, height, width]` and its text: `[images]` in float64.

        Texts that are too long are cut off.
        """
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.loaded.tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        arrays = list(images.permute(0, 2, 3, 1).numpy())
        image = self.model.get_image_features(pixel_values=pixels(self.loaded, arrays)).pooler_output
        text = self.model.get_text_features(**tokens.to(device(self.loaded))).pooler_output
        return F.cosine_similarity(image.double(), text.double(), dim=1).cpu()
