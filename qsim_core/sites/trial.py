"""One matmul tried under its quantizers, while the model around it stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST
from qsim_core.sites.device_products import multiplied
from qsim_core.sites.site import Site


def simulated(site: Site, call: Call, value_axis: str, pinned: bool) -> Tensor:
    """What the call gives with operands and result quantized; a `pinned` weight is on its grid already.

    What is added to a product of activations, a mask, is rounded with it. Raises `RecipeError` where a static scale is
    wanted, which is found after all transforms.
    """
    roles = [
        "weight" if i == call.weight else "input2" if i and call.weight is None else "input"
        for i in range(len(call.operands))
    ]
    for role in [*roles, "output"]:
        if getattr(site.planned(role), "static", False) and role not in (*site.fixed, "weight"):
            raise RecipeError(f"{site.name}: the static scale of its {role} is found after all transforms")
    operands = []
    for role, operand, layout in zip(roles, call.operands, call.layouts, strict=True):
        if role == "input2" and value_axis == "head" and site.is_value_product:
            layout = LAST
        quantizer: Any = None if role == "weight" and pinned else site.quantizer(role)
        operands.append(
            operand if quantizer is None else layout.back(quantizer.quantize(layout.rows(operand.detach())))
        )
    with torch.no_grad():
        result: Tensor = multiplied(site, call, roles, value_axis, quantizing=True).run(operands)
        output: Any = site.quantizer("output")
        return result if output is None else call.result.back(output.quantize(call.result.rows(result)))
