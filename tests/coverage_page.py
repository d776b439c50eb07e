"""Write the matmuls that are met in each model family, and the methods that run there: docs/coverage.md.

    python tests/coverage_page.py > docs/coverage.md
    python tests/coverage_page.py --methods             # tries every method on every family first: minutes

prints the whole page. What the methods did is kept in tests/golden/methods_by_family.json. Pairs that stand there are not
tried again: remove them, or the file.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

`tests/test_methods.py` runs the [methods](#methods), SVDQuant and ARCQuant on each, and `plugins/hadamard/tests` the rotations: each changes weights and names
those that it leaves alone, or refuses in a line.

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

METHODS_INTRODUCTION = """
## Methods

The number of layers that a method changed, and after `+` the number of those that it left alone and gave the reason. `–` means that it refused the whole model; the
reasons stand below. Weights are `int4`, activations `int8`, and the model's example is the calibration data. Learned methods take one step.
"""
METHODS = {
    "smoothquant": "smoothquant",
    "awq": "awq",
    "gptq": "gptq",
    "gptaq": "gptaq",
    "qronos": "qronos",
    "signround": "signround(1)",
    "adaround": "adaround(1)",
    "imatrix": "imatrix",
    "flatquant": "flatquant(1)",
    "rptq": "rptq",
}
"""The methods that are tried on every family, by the heads of their columns."""
KEPT = Path(__file__).parent / "golden" / "methods_by_family.json"
Outcome = dict[str, Any]
"""The numbers of layers that a method `changed` and `left`, or the text with which it `refused`."""


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


def outcome_of(name: str, method: str) -> Outcome:
    """Apply one method to a model of one family. Raises `AssertionError` for a layer left alone without a reason."""
    example = FAMILIES[name].example
    recipe: dict[str, Any] = {"weights": "int4", "activations": "int8", "transforms": [METHODS[method]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reports = qsim.simulate(build(name), recipe, calibration=[example], example=example).reports
        except qsim.QsimError as error:
            return {"refused": str(error)}
    assert all(report.note for report in reports if report.after is None), f"{method} on {name}"
    changed = {report.layer for report in reports if report.after is not None}
    return {"changed": len(changed), "left": len({report.layer for report in reports} - changed)}


def kept() -> dict[str, dict[str, Outcome]]:
    """The outcomes that were kept, by family and method."""
    found: dict[str, dict[str, Outcome]] = json.loads(KEPT.read_text())
    return found


def try_all() -> None:
    """Try every method on every family of which no outcome is kept; each is written at once."""
    before = kept() if KEPT.exists() else {}
    found = {name: {method: before.get(name, {}).get(method) for method in METHODS} for name in FAMILIES}
    for method in METHODS:
        for name, outcomes in found.items():
            if outcomes[method] is None:
                outcomes[method] = outcome_of(name, method)
                write(found)


def write(found: Mapping[str, Mapping[str, Outcome | None]]) -> None:
    """Write the outcomes that there are."""
    there = {name: {key: one for key, one in outcomes.items() if one} for name, outcomes in found.items()}
    KEPT.write_text(json.dumps(there, indent=1, ensure_ascii=False) + "\n")


def shown(outcome: Outcome | None) -> str:
    """One cell of the table of methods; empty if the pair was not tried."""
    if outcome is None:
        return ""
    if "refused" in outcome:
        return "–"
    return f"{outcome['changed']}+{outcome['left']}" if outcome["left"] else str(outcome["changed"])


def methods(found: dict[str, dict[str, Outcome]]) -> str:
    """The table of methods by family, and the reasons of those that refused."""
    lines = [f"| family | {' | '.join(METHODS)} |", "|---|" + "---|" * len(METHODS)]
    reasons: dict[str, list[str]] = {}
    for name in FAMILIES:
        outcomes = found.get(name, {})
        lines.append(f"| {name} | {' | '.join(shown(outcomes.get(method)) for method in METHODS)} |")
        for outcome in outcomes.values():
            if "refused" in outcome:
                text = re.split(r"; `qsim structure`|; |: Trying", outcome["refused"])[0]
                reasons.setdefault(text, []).append(name)
    told = [f"- {'; '.join(dict.fromkeys(names))}: {text}" for text, names in reasons.items()]
    return "\n".join([*lines, "", *told])


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
    return "\n".join([INTRODUCTION, *rows, END, METHODS_INTRODUCTION.strip(), "", methods(kept()), ""])


if __name__ == "__main__":
    if "--methods" in sys.argv:
        try_all()
    print(page(), end="")
