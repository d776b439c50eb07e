"""`QsimConfig`: models of transformers that are simulated as soon as they are loaded.

    from qsim_transformers import QsimConfig

    config = QsimConfig(weights="int4", activations="int8")
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)

`save_pretrained` writes the weights as they are, not quantized, and the recipe into config.json. `from_pretrained` of
that directory gives the same bits. transformers has no entry point for this: a program that does not import
`QsimConfig` gets a warning of transformers, and the model without quantizers.

`save_pretrained(simulation, directory)` does the same for a simulation with static and learned scales. These lie in one
tensor of the weights' files, `qsim_state`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qsim_core import ModelError, Recipe, RecipeError, Simulation, simulate
from qsim_core.evaluation.configuration import SIMULATED as METHOD
from qsim_core.sites.plan import Plan

ELSEWHERE = {
    "model": "from_pretrained names the model",
    "evaluate": "nothing is evaluated here",
    "transforms": "transforms need data; apply them with qsim_core.simulate",
}
"""Keys of a recipe that a configuration cannot have, and the reason."""
STATE = "qsim_state"
"""The tensor with what sites hold: the bytes of a safetensors file, with the example by which sites are found."""
EXAMPLE = "example."
"""The beginning of the names of the example's tensors in it."""


@register_quantization_config(METHOD)
class QsimConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The recipe of a model, as transformers has it in `quantization_config`.

    The arguments are the keys of a recipe: weights, activations, outputs, attention's queries, keys, probabilities,
    values or kv_cache, arithmetic, skip, overrides, value_axis, operations. Without `skip` the output layer of a
    language model is left alone. Raises `RecipeError` for what is not a recipe, for transforms, and for scales that
    are static or learned, as these need data. With `state`, as `save_pretrained` writes it, they are in the weights'
    files.
    """

    def __init__(self, *, state: bool = False, **recipe: Any) -> None:
        recipe.pop("quant_method", None)
        for key, reason in ELSEWHERE.items():
            if key in recipe:
                raise RecipeError(f"a QsimConfig has no {key}: {reason}")
        parsed = Recipe.of(recipe)
        if not parsed.quantizes:
            raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
        if (parsed.has_static or parsed.learns) and not state:
            raise RecipeError("static and learned scales need data; apply them with qsim_core.simulate")
        self.quant_method = METHOD
        self.state = state
        self.recipe = parsed.record()
        self.names_skip = "skip" in recipe

    def apply(
        self, model: nn.Module, state: Mapping[str, Tensor] | None = None, example: Mapping[str, Tensor] | None = None
    ) -> Simulation:
        """Simulate a model, in place. Layers of PEFT's adapters are not quantized, added before or afterwards.

        `state` has what the sites hold, and `example` is a batch by which they are found.
        """
        values = {key: value for key, value in self.to_dict().items() if key not in ("quant_method", "state")}
        if not self.names_skip:
            values["skip"] = tuple(_output_layers(model))
        recipe = Recipe.of(values)
        return simulate(
            model,
            BaseRecipe.model_construct(
                recipe.model_fields_set, **{name: getattr(recipe, name) for name in Recipe.model_fields}
            ),
            state=state,
            example=example,
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, with the method's name."""
        said = {key: value for key, value in self.recipe.items() if key not in ELSEWHERE}
        if not self.names_skip:
            said.pop("skip", None)
        return {"quant_method": METHOD, **({"state": True} if self.state else {}), **said}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())


@register_quantizer(METHOD)
class QsimQuantizer(HfQuantizer):  # type: ignore[misc]
    """Simulates a model once its weights are loaded. `model.hf_quantizer.simulation` is the simulation."""

    simulation: Simulation
    stored: dict[str, Tensor] | None = None
    """The tensors in `STATE`, as they were read; None: there are none."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.quantization_config.state:
            self.stored = _read_state(checkpoint_files or [])
            model._keys_to_ignore_on_load_unexpected |= {f"^{STATE}$"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        held, example = self.stored, None
        if held is not None:
            names = [name for name in held if name.startswith(EXAMPLE)]
            example = {name.removeprefix(EXAMPLE): held.pop(name).to(model.device) for name in names}
        self.simulation = self.quantization_config.apply(model, held, example)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save: the model's, and what the sites hold; None: the model's alone."""
        if not self.quantization_config.state:
            return None, {}
        example = {EXAMPLE + name: tensor for name, tensor in _tensors(self.simulation.example).items()}
        tensors = self.simulation.state_dict() | example
        octets = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        stored = torch.frombuffer(bytearray(octets), dtype=torch.uint8)
        return model.state_dict() | {STATE: stored}, {}

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        return self.simulation.restore()

    def is_serializable(self) -> bool:
        """True: the weights are saved as they are, and the recipe beside them."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: gradients go straight through the quantizers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: every forward quantizes the weights as they are at that time."""
        return True


def save_pretrained(simulation: Simulation, directory: str | Path) -> None:
    """Write a simulated model of transformers with its recipe, and what its sites hold, as `from_pretrained` reads it.

    Weights are written as they are, not quantized. Transforms are in them. Raises `QsimError` if a transform has left
    something at the sites that cannot be saved. It does so too for weights that were loaded quantized, and for an
    example that is not a mapping.
    """
    model: Any = simulation.model
    loaded_by = getattr(model, "hf_quantizer", None)
    if isinstance(loaded_by, QsimQuantizer):
        model.save_pretrained(directory)
        return
    if loaded_by is not None:
        raise ModelError(f"the weights were loaded quantized, by {type(loaded_by).__name__}, and only it can save them")
    said = {key: value for key, value in simulation.recipe.record().items() if key not in ELSEWHERE}
    quantizer = QsimQuantizer(QsimConfig(state=True, **said))
    quantizer.simulation = simulation
    tensors, _ = quantizer.get_state_dict_and_metadata(model)
    with _described_by(model.config, quantizer.quantization_config):
        model.save_pretrained(directory, state_dict=tensors)


@contextmanager
def _described_by(config: Any, quantization: QsimConfig) -> Iterator[None]:
    """Inside, a model's configuration has this part on its quantization, and no other."""
    before = vars(config).get("quantization_config")
    config.quantization_config = quantization
    try:
        yield
    finally:
        del config.quantization_config
        if before is not None:
            config.quantization_config = before


def _tensors(example: Any) -> dict[str, Tensor]:
    """The tensors of an example by the names of the model's arguments. Raises `RecipeError` if it has no names."""
    if not isinstance(example, Mapping):
        raise RecipeError("give simulate an example as a mapping, like {'input_ids': ids}: it is saved with the scales")
    return {name: value for name, value in example.items() if isinstance(value, Tensor)}


def _read_state(files: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors of `STATE` from the weights' files. Raises `ModelError` if it is not there."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            if STATE in tensors.keys():  # noqa: SIM118 - it is not a mapping
                found: dict[str, Tensor] = load(tensors.get_tensor(STATE).numpy().tobytes())
                return found
    raise ModelError(f"config.json says that scales are saved with the weights, and no file holds {STATE}")


class BaseRecipe(Recipe):
    """A recipe for a model under PEFT: the base is quantized, the adapters are not."""

    def plan(self, names: Iterable[str]) -> Plan:
        names = list(names)
        adapted = any(part.startswith(prefix) for name in names for part in name.split(".") for prefix in _prefixes())
        return Plan(value_axis=self.value_axis, skipped=True) if adapted else super().plan(names)


def _prefixes() -> tuple[str, ...]:
    """The beginnings of the names of adapters' modules; none before PEFT is imported, as there are no adapters then."""
    peft = sys.modules.get("peft.mapping")
    return () if peft is None else tuple({prefix for prefix in peft.PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix})


def _output_layers(model: nn.Module) -> Iterator[str]:
    """The names of a language model's output layer; none where a model has no such layer."""
    find = getattr(model, "get_output_embeddings", None)
    layer = None if find is None else find()
    if layer is not None:
        yield from (name for name, module in model.named_modules() if module is layer)
