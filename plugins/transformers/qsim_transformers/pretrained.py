"""Loading of models through their library's own `from_pretrained`: safetensors only, no remote code.

All adapters of families of transformers and diffusers share it. The libraries are imported when a model is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qsim_core.errors import ModelError, natural_order, one_line
from qsim_core.evaluation.adapter import Adapter, LoadedModel, check_finite
from qsim_core.evaluation.configuration import SIMULATED
from qsim_transformers.configuration import DIFFUSERS, architecture, configuration, evaluator_of, family
from qsim_transformers.foreign_code import check_no_foreign_code
from qsim_transformers.hub import offline_unless_reachable

TOKENIZERS = ("tokenizer.json", "*vocab*", "*.model", "merges.txt", "tekken.json")
SCALES = r"(_scale|_scales|_scale_inv|_scale_2|qweight|qzeros|weight_packed|absmax|quant_state\.\w+)$"
"""Endings of the names of tensors that quantized checkpoints hold beside weights."""
GENERATION = "generation_config.json"
"""The file of the settings of `generate`, which the library does not read beside weights that it is given."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Pretrained(Adapter):
    """An adapter for a family of transformers: it loads the class that a checkpoint names."""

    heads: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of the classes that it loads; none: every class of the family."""

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model, in eval mode, with its tokenizer or processor. Raises `ModelError`."""
        return load_pretrained(self.model_class(model), model, dtype)

    def outline(self, model: str, dtype: torch.dtype) -> nn.Module:
        """The model on the meta device, from its configuration alone. Raises `ModelError`."""
        of = self.model_class(model)
        check_no_foreign_code(model, "", _weights(of))
        try:
            with offline_unless_reachable(model):
                config = of.config_class.from_pretrained(model)
            with torch.device("meta"):
                return of(config).to(dtype).eval()  # type: ignore[no-any-return]
        except Exception as error:  # a wrong configuration fails anywhere in the library
            raise ModelError(f"{model} cannot be built from its configuration: {one_line(error)}") from None

    def load_dispatched(self, model: str, dtype: torch.dtype, to: str) -> LoadedModel:
        """The model, its weights placed by accelerate: "auto" on GPUs, in memory, then on disk; "disk" all on disk."""
        return load_pretrained(self.model_class(model), model, dtype, to)

    def evaluator_of(self, model: str) -> str:
        """The evaluator of the field of the checkpoint's head."""
        return evaluator_of(architecture(model))

    def configuration(self, source: str) -> Mapping[str, Any]:
        """The checkpoint's configuration, from a directory or the hub. Raises `ModelError`."""
        return configuration(source)

    def model_class(self, model: str) -> Any:
        """The class of transformers that a checkpoint names. Raises `ModelError` if it is of another family."""
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


def load_pretrained(
    model_class: Any, source: str, dtype: torch.dtype, to: str = "cpu", weights: Mapping[str, Tensor] | None = None
) -> LoadedModel:
    """A model in eval mode, with its tokenizer or image processor; `weights` as in `load_model`.

    Raises `ModelError` as `load_model` does, and for a tokenizer or processor that is missing.
    """
    _check_weights_exist(model_class, source)
    _check_preparation_exists(model_class, source)
    model = load_model(model_class, source, dtype, to=to, weights=weights)
    try:
        with offline_unless_reachable(source):
            return LoadedModel(model, *_preparation(model_class, source))
    except Exception as error:  # each kind of tokenizer reads other files and raises other errors
        raise ModelError(f"what prepares the inputs of {source} cannot be loaded: {one_line(error)}") from None


def load_model(
    model_class: Any,
    source: str,
    dtype: torch.dtype,
    subfolder: str = "",
    to: str = "cpu",
    weights: Mapping[str, Tensor] | None = None,
    config: Any = None,
) -> Any:
    """A model of transformers or diffusers in eval mode, on the CPU or dispatched ("auto", "disk").

    `weights` has tensors by their names in the checkpoint, in the place of those in its files. That is for models of
    transformers on the CPU, and leaves aside what the configuration says of quantization. `config` is the configuration
    of a model whose source has no config.json.

    Raises `ModelError` for weights that are missing, pickled, corrupt, of other shapes than the configuration's, or not
    finite.
    """
    from safetensors import SafetensorError

    where = f"{source}/{subfolder}" if subfolder else source
    _check_weights_exist(model_class, where)
    if config is None:
        check_no_foreign_code(source, subfolder, _weights(model_class))
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
    if not _of_diffusers(model_class):
        how["trust_remote_code"] = False  # diffusers has no such option for single models
    folder = None
    if to != "cpu":
        if importlib.util.find_spec("accelerate") is None:
            raise ModelError(f"--device {to} needs accelerate; pip install accelerate")
        folder = tempfile.TemporaryDirectory(prefix="qsim-")  # for tensors that no file holds in this dtype
        how |= {"device_map": {"": to}, "offload_folder": folder.name, "offload_buffers": True}
    try:
        if to == "auto":
            how["device_map"] = _device_map(model_class, source, subfolder, dtype)
        found: str | None = source
        if config is not None:
            how["config"] = config
        elif weights is not None or (not subfolder and _is_simulated(source)):
            how["config"] = _without_quantization(model_class, source)
        if weights is not None:
            found, how["state_dict"] = None, dict(weights)
        read = functools.partial(
            model_class.from_pretrained, found, subfolder=subfolder, output_loading_info=True, **how
        )
        with offline_unless_reachable(source):
            model, report = read()
            if report["missing_keys"] and all(name.startswith("pooler.") for name in report["missing_keys"]):
                model, report = read(add_pooling_layer=False)  # the checkpoint has no pooler: it was not trained
    except SafetensorError as error:
        raise ModelError(f"the weights of {where} are corrupt: {one_line(error)}; fetch or save them again") from None
    except Exception as error:  # a wrong configuration fails anywhere in the library
        raise ModelError(f"{where} cannot be loaded: {one_line(error)}") from None
    _check_all_weights_there(report, where)
    _check_scales_were_read(report, where)
    check_finite(model)
    if weights is not None and (Path(source) / GENERATION).is_file() and model.can_generate():
        model.generation_config = model.generation_config.from_pretrained(source)
    if folder is not None:
        weakref.finalize(model, folder.cleanup)
    return model.eval()


def _is_simulated(source: str) -> bool:
    """Tell if a checkpoint was saved from a simulation: its weights are plain, and the recipe stands beside them."""
    quantization = configuration(source).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == SIMULATED


def _without_quantization(model_class: Any, source: str) -> Any:
    """The configuration of a checkpoint, as if its weights were plain."""
    with offline_unless_reachable(source):
        config = model_class.config_class.from_pretrained(source)
    for part in (config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))):
        vars(part).pop("quantization_config", None)
    return config


def _check_all_weights_there(report: Any, where: str) -> None:
    """Raise `ModelError` for weights that the library filled in at random: those missing, or of another shape."""
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"], key=lambda found: natural_order(found[0]))
        raise ModelError(
            f"weight {name} of {where} has shape {tuple(stored)}, its configuration says {tuple(expected)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"], key=natural_order)
        raise ModelError(f"the weights of {where} lack {missing[0]}{_more(missing)}")


def _check_scales_were_read(report: Any, where: str) -> None:
    """Raise `ModelError` for a checkpoint with scales that the class does not know: they were not applied."""
    scales = [name for name in sorted(report["unexpected_keys"], key=natural_order) if re.search(SCALES, name)]
    if scales:
        raise ModelError(
            f"the weights of {where} are quantized: it holds {scales[0]}{_more(scales)}, and the class does not read "
            f"scales; take the checkpoint that it was quantized from"
        )


def _device_map(model_class: Any, source: str, subfolder: str, dtype: torch.dtype) -> Any:
    """ "auto"; for a model of diffusers that does not name the modules to keep together, a map that splits no block."""
    if not _of_diffusers(model_class) or model_class._no_split_modules is not None:
        return "auto"
    from accelerate import infer_auto_device_map, init_empty_weights

    with init_empty_weights():
        model = model_class.from_config(model_class.load_config(source, subfolder=subfolder))
    parts = [block for part in model.children() for block in (part if isinstance(part, nn.ModuleList) else [part])]
    together = sorted({type(part).__name__ for part in parts})
    return infer_auto_device_map(model, dtype=dtype, no_split_module_classes=together)


def _preparation(model_class: Any, source: str) -> tuple[Any, Any]:
    """Tokenizer and processor: the one that the main input needs, and the other if its files are there."""
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


def _of_diffusers(model_class: Any) -> bool:
    return str(model_class.__module__).partition(".")[0] == DIFFUSERS


def _weights(model_class: Any) -> str:
    return "diffusion_pytorch_model.safetensors" if _of_diffusers(model_class) else "model.safetensors"


def _check_weights_exist(model_class: Any, source: str) -> None:
    directory = Path(source)
    weights = _weights(model_class)
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
    """Raise `ModelError` for a missing tokenizer or processor; transformers would make one without a vocabulary."""
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
    """True if a directory holds a file of one of these names; the hub is not asked."""
    return any(next(Path(source).glob(pattern), None) for pattern in patterns)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
