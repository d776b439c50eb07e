"""Write the matmuls that are met in each model family: docs/coverage.md.

    python tests/coverage_page.py > docs/coverage.md

prints the whole page.
"""

from __future__ import annotations

import functools

from architectures import FAMILIES, build
from torch import nn

import qsim_core as qsim
from qsim_core.components.host import installed

INTRODUCTION = """# Coverage

Every product of matrices that torch computes in a model has sites. `tests/test_coverage.py` makes a tiny model of each of these families,
in its default implementation. It asserts:

- Each product that torch's dispatcher sees is met exactly once, by the module that computes it.
- Quantizers that change nothing change no output by more than 10⁻⁵ of its largest value. `int8` changes an output.
- The products that cannot be met are listed.

`tests/test_methods.py` runs SmoothQuant, AWQ, GPTQ, GPTAQ, SignRound, `imatrix`, SVDQuant, ARCQuant and FlatQuant on each, and `plugins/hadamard/tests` the
rotations: each changes weights and names those that it leaves alone, or refuses in a line. They stand for the methods that find their weights in the same way.

This page is written by `python tests/coverage_page.py`.

`matmuls` counts the matmuls with sites. `weights` counts those of them that multiply by a parameter; the others multiply two computed
tensors. `attention` counts the pairs of QKᵀ and PV that have these names. A family with the adapter `generic` has no adapter of its own: it
is loaded as the class that its checkpoint names. A model without an adapter is simulated from Python. A weight of experts is one site, and
each expert is quantized by itself.
"""
END = """
The audit lists products that no site can meet under `uncovered`. They are torch's recurrent layers and `bilinear`, fused kernels, and
custom operators (`torch.library`) that take two matrices. A kernel that Python calls in CUDA directly, past torch's dispatcher, is
not found. Everything between the products stays as it is: norms, softmax, activation functions, scans of state spaces.
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
