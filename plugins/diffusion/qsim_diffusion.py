"""Diffusion models as diffusers saves them: a denoiser, an autoencoder, or a pipeline with all its networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from qsim_transformers.configuration import architecture, configuration
from qsim_transformers.hub import offline_unless_reachable
from qsim_transformers.pretrained import load_model
from torch import nn

from qsim_core import Adapter, LoadedModel, ModelError, hookimpl
from qsim_core.errors import one_line


class Pipeline(nn.Module):
    """The networks of a pipeline under the pipeline's names, so that sites are `unet.…`, `text_encoder.…`, `vae.…`.

    Calling the module runs the pipeline: `model(prompt="a cat", num_inference_steps=2, output_type="pt").images`.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.pipeline = pipeline

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipeline(*args, **kwargs)


class Diffusion(Adapter):
    """A model or a whole pipeline of diffusers: UNets, diffusion transformers, autoencoders, text encoders."""

    name = "diffusion"
    families = ("diffusers",)
    evaluator: ClassVar[str] = "denoising"

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """Load a model, or a `Pipeline` that contains its tokenizer and its scheduler, in eval mode.

        A pipeline with one network is loaded as that network, with the scheduler as processor. Raises `ModelError`.
        """
        return self.load_dispatched(model, dtype, "cpu")

    def load_dispatched(self, model: str, dtype: torch.dtype, to: str) -> LoadedModel:
        """Load the same, with the weights of each network on the devices that accelerate chooses."""
        import diffusers

        name = architecture(model)
        if _is(getattr(diffusers, name, None), diffusers.DiffusionPipeline):
            return _load_pipeline(getattr(diffusers, name), model, dtype, to)
        if _is(getattr(diffusers, name, None), diffusers.ModelMixin):
            return LoadedModel(load_model(getattr(diffusers, name), model, dtype, to=to))
        raise ModelError(
            f"{model} is of class {name}, which is neither a model nor a pipeline of diffusers {diffusers.__version__}"
        )

    def configuration(self, source: str) -> Mapping[str, Any]:
        """The configuration of a model, or of a pipeline. Raises `ModelError`."""
        return configuration(source)

    def evaluator_of(self, model: str) -> str:
        """`denoising` for a U-Net with its scheduler, which makes images of noise; `fidelity` for all others."""
        parts = {part for part in configuration(model) if not part.startswith("_")}
        return self.evaluator if parts == {"scheduler", "unet"} else "fidelity"


def _load_pipeline(pipeline_class: Any, source: str, dtype: torch.dtype, to: str) -> LoadedModel:
    """Load the networks one by one, checking the weights of each, then the pipeline around them."""
    import diffusers

    said = {part: of for part, of in configuration(source).items() if isinstance(of, list) and len(of) == 2}
    classes = {part: _class_of(part, of[0], of[1], source) for part, of in said.items() if isinstance(of[1], str)}
    networks = {
        name: load_model(found, source, dtype, name, to) for name, found in classes.items() if _is(found, nn.Module)
    }
    log = diffusers.utils.logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with offline_unless_reachable(source):
            pipeline = pipeline_class.from_pretrained(source, **networks)
    except Exception as error:  # schedulers and tokenizers raise errors of any class
        raise ModelError(f"{source} cannot be loaded: {one_line(error)}") from None
    finally:
        if bars:
            log.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    if len(networks) == 1:  # a denoiser alone is the model, and its scheduler the processor
        return LoadedModel(next(iter(networks.values())).eval(), processor=pipeline.scheduler)
    processor = pipeline.components.get("feature_extractor")
    return LoadedModel(Pipeline(pipeline).eval(), pipeline.components.get("tokenizer"), processor)


def _class_of(part: str, library: Any, name: str, source: str) -> Any:
    """Return the class of a pipeline's part, from transformers, diffusers, or one pipeline's module in diffusers."""
    import diffusers
    import transformers

    homes = {"diffusers": diffusers, "transformers": transformers}
    found = getattr(homes.get(library) or getattr(diffusers.pipelines, str(library), None), name, None)
    if not isinstance(found, type):
        raise ModelError(
            f"{part} of {source} is of class {library}.{name}, which is neither diffusers' nor transformers'"
        )
    return found


def _is(found: Any, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [Diffusion]
