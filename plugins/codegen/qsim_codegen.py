"""CodeGen (`model_type` "codegen"): language models for programs, arXiv 2203.13474."""

from __future__ import annotations

from qsim_transformers.pretrained import Pretrained

from qsim_core import Adapter, hookimpl


class CodeGen(Pretrained):
    """CodeGen models from a directory or the hub; `lm_head` is not quantized, as for OPT."""

    name = "codegen"
    heads = ("ForCausalLM",)
    skip = ("lm_head",)


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [CodeGen]
