"""OPT (`model_type` "opt"): decoder-only language models, arXiv 2205.01068."""

from __future__ import annotations

import torch

from qsim_core import Adapter, LoadedModel, hookimpl


class OPT(Adapter):
    """OPT models from a directory or the hub; `lm_head` is left alone, as the papers on OPT leave it."""

    name = "opt"
    evaluator = "perplexity"
    skip = ("lm_head",)

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model and its tokenizer, in eval mode. Raises `ModelError`."""
        from transformers import OPTForCausalLM

        from qsim_core.pretrained import load_pretrained

        return load_pretrained(OPTForCausalLM, model, dtype)


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [OPT]
