"""Models on disk or on the hub, through their library's own `from_pretrained`: safetensors only, no remote code.

What every adapter of transformers' and diffusers' families shares. The libraries are imported when a model is loaded,
and are the adapter's dependency, not the core's.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qsim_core.errors import ModelError
from qsim_core.evaluation.adapter import Adapter, LoadedModel
from qsim_core.transformers.configuration import DIFFUSERS, architecture, evaluator_of, family, line
from qsim_core.transforms.offload import state

TOKENIZERS = ("tokenizer.json", "*vocab*", "*.model", "merges.txt", "tekken.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Pretrained(Adapter):
    """An adapter for families of transformers: it loads the class that a checkpoint names."""

    heads: ClassVar[tuple[str, ...]] = ()
    """How the names of the classes that it loads end; every class of the family if there are none."""

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model and what prepares its inputs, in eval mode. Raises `ModelError`."""
        return load_pretrained(self.model_class(model), model, dtype)

    def load_dispatched(self, model: str, dtype: torch.dtype, to: str) -> LoadedModel:
        """With accelerate: "auto" fills GPUs, then memory, then disk; "disk" leaves every weight in its file."""
        return load_pretrained(self.model_class(model), model, dtype, to)

    def evaluator_of(self, model: str) -> str:
        """The evaluator of the field that the checkpoint's head is made for."""
        return evaluator_of(architecture(model))

    def model_class(self, model: str) -> Any:
        """transformers' class of the name and the family that a checkpoint gives. Raises `ModelError`."""
        import transformers

        name, of = architecture(model), family(model)
        if self.heads and not name.endswith(self.heads):
            raise ModelError(
                f"{model} is of class {name}, and adapter {self} loads {', '.join(f'…{head}' for head in self.heads)}; "
                f"from Python, qsim_core.simulate takes any model"
            )
        found: Any = getattr(transformers, name, None)
        known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if not known:
            raise ModelError(f"{model} is of class {name}, which transformers {transformers.__version__} does not have")
        if found.config_class.model_type != of:
            raise ModelError(f"{model} is said to be of class {name} and of family {of!r}, which do not go together")
        return found


class Generic(Pretrained):
    """For a family of transformers that no adapter is installed for: the class that the checkpoint names, as it is."""

    name = "generic"

    def note(self, model: str) -> str:
        """What a reader must know about a model that was loaded so."""
        return (
            f"no adapter for {family(model)!r} models is installed: loaded as {architecture(model)}, and no site is "
            f"left alone unless --skip says so"
        )


def load_pretrained(model_class: Any, source: str, dtype: torch.dtype, to: str = "cpu") -> LoadedModel:
    """A model and its tokenizer or image processor, in eval mode. Raises `ModelError` as `load_model` does,
    and for a tokenizer or processor that is missing."""
    _check_weights_exist(model_class, source)
    _check_preparation_exists(model_class, source)
    model = load_model(model_class, source, dtype, to=to)
    try:
        return LoadedModel(model, *_preparation(model_class, source))
    except Exception as error:  # they are read from as many files as there are kinds of tokenizers
        raise ModelError(f"what prepares the inputs of {source} cannot be loaded: {line(error)}") from None


def load_model(model_class: Any, source: str, dtype: torch.dtype, subfolder: str = "", to: str = "cpu") -> Any:
    """A model of transformers or diffusers in eval mode, on the CPU or dispatched ("auto", "disk"). Raises `ModelError`
    for weights that are missing, pickled, corrupt, of other shapes than the configuration's, or not finite."""
    from safetensors import SafetensorError

    where = f"{source}/{subfolder}" if subfolder else source
    _check_weights_exist(model_class, where)
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
    if not _of_diffusers(model_class):
        how["trust_remote_code"] = False  # diffusers has no remote code for single models
    folder = None
    if to != "cpu":
        if importlib.util.find_spec("accelerate") is None:
            raise ModelError(f"--device {to} needs accelerate; pip install accelerate")
        folder = tempfile.TemporaryDirectory(prefix="qsim-")  # what no safetensors file holds in this dtype goes there
        how |= {"device_map": {"": to}, "offload_folder": folder.name, "offload_buffers": True}
    try:
        if to == "auto":
            how["device_map"] = _device_map(model_class, source, subfolder, dtype)
        read = functools.partial(
            model_class.from_pretrained, source, subfolder=subfolder, output_loading_info=True, **how
        )
        model, report = read()
        if report["missing_keys"] and all(name.startswith("pooler.") for name in report["missing_keys"]):
            model, report = read(add_pooling_layer=False)  # saved without, as the pooler was not trained
    except SafetensorError as error:
        raise ModelError(f"the weights of {where} are corrupt: {line(error)}; fetch or save them again") from None
    except Exception as error:  # a configuration can be wrong in as many ways as a library has layers
        raise ModelError(f"{where} cannot be loaded: {line(error)}") from None
    _check_all_weights_there(report, where)
    check_finite(model)
    if folder is not None:
        weakref.finalize(model, folder.cleanup)
    return model.eval()


def _check_all_weights_there(report: Any, where: str) -> None:
    """Raise `ModelError` for what a library filled in at random, as it found no weight or one of another shape."""
    if report["mismatched_keys"]:
        name, stored, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(
            f"weight {name} of {where} has shape {tuple(stored)}, its configuration says {tuple(expected)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"the weights of {where} lack {missing[0]}{_more(missing)}")


def _device_map(model_class: Any, source: str, subfolder: str, dtype: torch.dtype) -> Any:
    """ "auto"; for a model of diffusers that does not say which modules stay together a map that splits no block."""
    if not _of_diffusers(model_class) or model_class._no_split_modules is not None:
        return "auto"
    from accelerate import infer_auto_device_map, init_empty_weights

    with init_empty_weights():
        model = model_class.from_config(model_class.load_config(source, subfolder=subfolder))
    parts = [block for part in model.children() for block in (part if isinstance(part, nn.ModuleList) else [part])]
    together = sorted({type(part).__name__ for part in parts})
    return infer_auto_device_map(model, dtype=dtype, no_split_module_classes=together)


def _preparation(model_class: Any, source: str) -> tuple[Any, Any]:
    """Tokenizer and processor: what the model's main input needs, and the other if it lies beside it."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    main = model_class.main_input_name
    tokenizer = processor = None
    if main == "input_ids" or _has(source, TOKENIZERS):
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    images_too = hasattr(model_class, "get_image_features") and not Path(source).is_dir()  # CLIP, on a hub
    if main != "input_ids" or images_too or _has(source, PROCESSORS):
        kind = AutoFeatureExtractor if main in ("input_features", "input_values") else AutoImageProcessor
        processor = kind.from_pretrained(source, trust_remote_code=False)
    return tokenizer, processor


def check_finite(model: nn.Module) -> None:
    """Raise `ModelError`, naming the parameter, if a weight is NaN or Inf."""
    names = {name for name, _ in model.named_parameters()}
    bad = [name for name, tensor in state(model) if name in names and not tensor.isfinite().all()]
    if bad:
        raise ModelError(
            f"weight {bad[0]}{_more(bad)} holds NaN or Inf; nothing measured on this model would mean much"
        )


def _of_diffusers(model_class: Any) -> bool:
    return str(model_class.__module__).partition(".")[0] == DIFFUSERS


def _check_weights_exist(model_class: Any, source: str) -> None:
    directory = Path(source)
    weights = "diffusion_pytorch_model.safetensors" if _of_diffusers(model_class) else "model.safetensors"
    if not directory.is_dir() or any((directory / name).exists() for name in (weights, f"{weights}.index.json")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{source} holds {pickles[0]}, a pickle, which could run code; load it where you trust it and "
            f"save_pretrained() it as safetensors"
        )
    raise ModelError(f"{source} has no weights: expected {weights}")


def _check_preparation_exists(model_class: Any, source: str) -> None:
    """Without its files transformers makes a tokenizer that knows no word."""
    if not Path(source).is_dir():
        return
    if model_class.main_input_name == "input_ids":
        if not _has(source, TOKENIZERS):
            raise ModelError(f"{source} has no tokenizer: expected tokenizer.json; save the tokenizer beside the model")
    elif not _has(source, PROCESSORS):
        raise ModelError(
            f"{source} has no processor: expected preprocessor_config.json; save the image processor or feature "
            f"extractor beside the model"
        )


def _has(source: str, patterns: tuple[str, ...]) -> bool:
    """Whether a directory holds a file of one of these names; a hub is not asked."""
    return any(next(Path(source).glob(pattern), None) for pattern in patterns)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
