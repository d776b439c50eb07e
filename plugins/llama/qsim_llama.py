"""Llama (`model_type` "llama", arXiv 2302.13971) and families with the same architecture."""

from __future__ import annotations

from qsim_transformers.pretrained import Pretrained

from qsim_core import Adapter, hookimpl


class Llama(Pretrained):
    """Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi, Phi-3 and Gemma; `lm_head` is not quantized, as for OPT."""

    name = "llama"
    families = (
        "gemma",
        "gemma2",
        "gemma3_text",
        "mistral",
        "mixtral",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    )
    heads = ("ForCausalLM",)
    skip = ("lm_head",)


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [Llama]
