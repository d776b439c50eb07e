"""GPT-2 of transformers, from a directory or the hub."""

from __future__ import annotations

import qsim_core as qsim
from qsim_core.pretrained import Pretrained


class GPT2(Pretrained):
    """GPT-2: a checkpoint names its class, and only those with a head for language modelling are loaded."""

    name = "gpt2"
    heads = ("LMHeadModel",)
    skip = ("lm_head",)  # sites that stay as they are unless a recipe says otherwise


@qsim.hookimpl
def qsim_adapters() -> list[type[qsim.Adapter]]:
    return [GPT2]
