"""The zoo: small trained models and their data, so that everything runs offline.

A name resolves to a directory, which the adapter of the model's family then loads like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qsim_core import Adapter, Data, LoadedModel, NamedModel, hookimpl, parse

MODELS = Path(__file__).with_name("models")


def trained(name: str) -> Path:
    """The directory of a model that the zoo's wheel carries."""
    return MODELS / name


def documentation() -> Data:
    """The test split of Python's own documentation, as the running interpreter has it."""
    from qsim_zoo.text import text

    return Data.of_text("zoo: Python's documentation, test split", text("test"))


def other_documentation() -> Data:
    """The train split, for calibration: none of what models are evaluated on."""
    from qsim_zoo.text import text

    return Data.of_text("zoo: Python's documentation, train split", text("train"))


def with_outliers() -> Path:
    """The directory of opt-tiny-outliers, made from opt-tiny when it is first asked for."""
    from qsim_zoo.outliers import directory

    return directory(trained("opt-tiny"))


class Zoo(Adapter):
    """`opt-tiny`, and `opt-tiny-outliers`: the same function with the activation outliers of large models."""

    name = "zoo"

    def models(self) -> Mapping[str, NamedModel]:
        return {
            "opt-tiny": NamedModel(
                lambda: trained("opt-tiny"),
                documentation,
                "OPT, 4 layers of width 256, on Python's documentation",
                other_documentation,
            ),
            "opt-tiny-outliers": NamedModel(
                with_outliers,
                documentation,
                "opt-tiny with outlier channels in the norms, the same function",
                other_documentation,
            ),
        }

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """A model of the zoo by name, through the adapter of its family."""
        family: Adapter = parse("opt")
        return family.load(str(self.models()[model].directory()), dtype)


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [Zoo]
