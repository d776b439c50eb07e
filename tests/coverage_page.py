"""`python tests/coverage_page.py > docs/coverage.md`: what is met in each family, as it is found."""

from __future__ import annotations

import functools

from architectures import FAMILIES, build
from torch import nn

import qsim_core as qsim
from qsim_core.components.host import installed

INTRODUCTION = """# Coverage

Every product of matrices that torch computes in a model has sites. For each of these families `tests/test_coverage.py` makes a tiny
model, in the implementation that is the default, and asserts that each product that torch's dispatcher sees is met exactly once, by the
module that computes it, that quantizers which change nothing change no output by more than 10⁻⁵ of its largest value, that `int8` does,
and that what cannot be met is listed. This page is written by `python tests/coverage_page.py`.

`matmuls` are sites; `weights` of them multiply by a parameter, the others two computed tensors; `attention` counts the pairs
of QKᵀ and PV that are known by these names. A family whose adapter is `generic` has none of its own and is loaded as the class that its
checkpoint names; what is written by hand is simulated from Python. A weight of experts is one site, and each expert is quantized by itself.
"""
END = """
What no site can meet is listed by the audit, under `uncovered`: torch's recurrent layers and `bilinear`, fused kernels, and operators of
one's own (`torch.library`) that take two matrices. A kernel that is called past torch's dispatcher, from Python straight into CUDA, is seen
by nobody. Whatever else torch computes between the products, norms, softmax, curves, scans of state spaces, stays as it is.
"""


@functools.cache
def audit_of(name: str) -> qsim.Audit:
    """The audit of one family under 8-bit integers."""
    return qsim.simulate(build(name), weights="int8", activations="int8", example=FAMILIES[name].example).audit()


def adapter_of(model: nn.Module) -> str:
    """The adapter that would load a checkpoint of this model from the command line."""
    found = installed().components(qsim.Adapter).items()
    offers = {name: [name, *getattr(offered, "families", ())] for name, several in found for _, offered in several}
    config = getattr(model, "config", None)
    if config is None:
        return ""
    family = getattr(config, "model_type", "diffusers")
    return next((name for name, families in offers.items() if family in families), "generic")


def page() -> str:
    """The whole page."""
    rows = [
        "| family | class | adapter | matmuls | weights | attention | not reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in FAMILIES:
        audit, model = audit_of(name), build(name)
        weights = sum(site.weight is not None for site in audit.sites)
        pairs = sum(alias.endswith(":pv") for site in audit.sites for alias in site.aliases)
        cells = [
            name,
            f"`{type(model).__name__}`",
            adapter_of(model),
            len(audit.sites),
            weights,
            pairs or "",
            ", ".join(f"`{u}`" for u in audit.uncovered),
        ]
        rows.append(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|")
    return "\n".join([INTRODUCTION, *rows, END])


if __name__ == "__main__":
    print(page(), end="")
