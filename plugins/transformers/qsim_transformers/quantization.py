"""`QsimConfig`: models of transformers that are simulated as soon as they are loaded.

    from qsim_transformers import QsimConfig

    config = QsimConfig(weights="int4", activations="int8")
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)

`save_pretrained` writes the weights as they are, not quantized, and the recipe into config.json. `from_pretrained` of
that directory gives the same bits. transformers has no entry point for this: a program that does not import
`qsim_transformers` gets a warning of transformers, and the model without quantizers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qsim_core import Recipe, RecipeError, Simulation, simulate
from qsim_core.sites.plan import Plan

METHOD = "qsim"
"""The `quant_method` in config.json."""
ELSEWHERE = {
    "model": "from_pretrained names the model",
    "evaluate": "nothing is evaluated here",
    "transforms": "transforms need data; apply them with qsim_core.simulate",
}
"""Keys of a recipe that a configuration cannot have, and the reason."""


@register_quantization_config(METHOD)
class QsimConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The recipe of a model, as transformers has it in `quantization_config`.

    The arguments are the keys of a recipe: weights, activations, outputs, attention's queries, keys, probabilities,
    values or kv_cache, arithmetic, skip, overrides, value_axis, operations. Without `skip` the output layer of a
    language model is left alone. Raises `RecipeError` for what is not a recipe, for transforms, and for scales that
    are static or learned, as these need data.
    """

    def __init__(self, **recipe: Any) -> None:
        recipe.pop("quant_method", None)
        for key, reason in ELSEWHERE.items():
            if key in recipe:
                raise RecipeError(f"a QsimConfig has no {key}: {reason}")
        parsed = Recipe.of(recipe)
        if not parsed.quantizes:
            raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
        if parsed.has_static or parsed.learns:
            raise RecipeError("static and learned scales need data; apply them with qsim_core.simulate")
        self.quant_method = METHOD
        self.recipe = parsed.record()
        self.names_skip = "skip" in recipe

    def apply(self, model: nn.Module) -> Simulation:
        """Simulate a model, in place. Layers of PEFT's adapters are not quantized, added before or afterwards."""
        values = self.to_dict()
        del values["quant_method"]
        if not self.names_skip:
            values["skip"] = tuple(_output_layers(model))
        recipe = Recipe.of(values)
        return simulate(
            model,
            BaseRecipe.model_construct(
                recipe.model_fields_set, **{name: getattr(recipe, name) for name in Recipe.model_fields}
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, with the method's name."""
        said = {key: value for key, value in self.recipe.items() if key not in ELSEWHERE}
        if not self.names_skip:
            said.pop("skip", None)
        return {"quant_method": METHOD, **said}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())


@register_quantizer(METHOD)
class QsimQuantizer(HfQuantizer):  # type: ignore[misc]
    """Simulates a model once its weights are loaded. `model.hf_quantizer.simulation` is the simulation."""

    simulation: Simulation

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.simulation = self.quantization_config.apply(model)
        return model

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
