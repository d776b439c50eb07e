"""OPT (`model_type` "opt"): decoder-only language models, arXiv 2205.01068."""

from __future__ import annotations

from typing import Any

from qsim_transformers.pretrained import Pretrained
from torch import nn

from qsim_core import Adapter, hookimpl


class OPT(Pretrained):
    """OPT models from a directory or the hub; `lm_head` is not quantized, as in the papers on quantizing OPT."""

    name = "opt"
    heads = ("ForCausalLM",)
    skip = ("lm_head",)

    def structure(self, model: nn.Module) -> dict[str, list[str]] | None:
        """The norms before attention and before fc1. Norms after the residual (OPT-350m) cannot be folded."""
        config: Any = model.config
        if not config.do_layer_norm_before:
            return None
        groups = {}
        for layer in range(config.num_hidden_layers):
            path = f"model.decoder.layers.{layer}"
            groups[f"{path}.self_attn_layer_norm"] = [f"{path}.self_attn.{p}_proj.weight" for p in "qkv"]
            groups[f"{path}.final_layer_norm"] = [f"{path}.fc1.weight"]
        return groups


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [OPT]
