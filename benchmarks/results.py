"""Every method on the zoo's models: the tables of docs/results.md.

    python benchmarks/results.py [--limit WINDOWS] [NAME …]

Fills in the tables of docs/results.md, or those that are named, between their markers. Each number is one
`qsim.evaluate`, on all of the test split, with 32 windows of the train split as calibration data; about half an
hour in all on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path

import qsim_core as qsim
from qsim_core.compose import compose
from qsim_core.progress import hush_libraries

DOCUMENT = Path(__file__).parent.parent / "docs" / "results.md"
MODELS = ["opt-tiny", "opt-tiny-outliers"]
PRECISIONS = {
    "W4A4": {"precision": "w4a4"},
    "W4A8": {"precision": "w4a8"},
    "W4A8 e4m3": {"precision": "w4a8", "texts": {"activations": "e4m3"}},
}
METHODS: dict[str, dict[str, object]] = {
    "rounding to nearest": {},
    "static MSE": {"static": "mse"},
    "SmoothQuant": {"plugins": ["smoothquant"]},
    "AWQ": {"plugins": ["awq"]},
    "Hadamard": {"plugins": ["hadamard"]},
    "GPTQ": {"plugins": ["gptq"]},
    "SmoothQuant, GPTQ": {"plugins": ["smoothquant", "gptq"]},
    "Hadamard, GPTQ": {"plugins": ["hadamard", "gptq"]},
    "RPTQ": {"plugins": ["rptq"]},
    "RPTQ, GPTQ": {"plugins": ["rptq", "gptq"]},
    "ABFP": {"plugins": ["abfp"]},
    "ABFP-SQ": {"plugins": ["abfp", "smoothquant"]},
    "ABFP-GPTQ": {"plugins": ["abfp", "gptq"]},
    "ABFP-SQ-GPTQ": {"plugins": ["abfp", "smoothquant", "gptq"]},
}
WEIGHTS = {
    "W4, by channel": "int4",
    "W3, by channel": "int3",
    "W4, groups of 64": "block(int4, 64, symmetric=false)",
    "W3, groups of 64": "block(int3, 64, symmetric=false)",
    "NF4, groups of 64": "block(nf4, 64)",
    "MXFP4": "mxfp4",
}
WEIGHT_METHODS = {
    "rounding to nearest": [],
    "bias correction": ["bias_correction"],
    "AWQ": ["awq"],
    "GPTQ": ["gptq"],
    "GPTQ, act-order": ["gptq(act_order=true)"],
}
FAMILIES = ["opt-tiny", "codegen-tiny", "bert-tiny", "bert-tiny-classifier", "vit-tiny", "ddpm-tiny", "minilm"]
FORMATS: dict[str, dict[str, object]] = {
    "W8A8": {"precision": "w8a8"},
    "W4A8": {"precision": "w4a8"},
    "W4A4": {"precision": "w4a4"},
    "ABFP W4A8": {"precision": "w4a8", "plugins": ["abfp"]},
    "ABFP W4A4": {"precision": "w4a4", "plugins": ["abfp"]},
}


def perplexity(model: str, limit: int | None, **options: object) -> str:
    """One cell: the simulated perplexity, or why there is none."""
    host = qsim.Host()
    try:
        recipe = compose(host, {"model": model}, **options)  # type: ignore[arg-type]
        result = qsim.evaluate(recipe, host=host, run=qsim.Run(limit=limit))
    except qsim.QsimError as error:
        print(f"{model} {options}: {error}", file=sys.stderr)
        return "—"
    print(f"{model} {options}: {result.simulated['perplexity']:.2f}", file=sys.stderr)
    value = result.simulated["perplexity"]
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def methods(limit: int | None) -> str:
    """Rows of methods, columns of precisions, for each model."""
    columns = [(model, name, options) for model in MODELS for name, options in PRECISIONS.items()]
    lines = [
        "| | " + " | ".join(f"{model} {name}" for model, name, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for method, how in METHODS.items():
        cells = [perplexity(model, limit, **{**options, **how}) for model, _, options in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weights(limit: int | None) -> str:
    """Rows of weight formats, columns of methods, for each model; activations stay in float32."""
    columns = [(model, method, transforms) for model in MODELS for method, transforms in WEIGHT_METHODS.items()]
    lines = [
        "| | " + " | ".join(f"{model} {method}" for model, method, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, text in WEIGHTS.items():
        cells = []
        for model, _, transforms in columns:
            host = qsim.Host()
            recipe = qsim.Recipe.of({"model": model, "weights": text, "transforms": transforms}, host)
            result = qsim.evaluate(recipe, host=host, run=qsim.Run(limit=limit))
            print(f"{model} {text} {transforms}: {result.simulated['perplexity']:.2f}", file=sys.stderr)
            cells.append(f"{result.simulated['perplexity']:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def families(limit: int | None) -> str:
    """Rows of models with the metric of their field, columns of formats."""
    lines = ["| | float32 | " + " | ".join(FORMATS) + " |", "|---|---:|" + "---:|" * len(FORMATS)]
    for model in FAMILIES:
        cells: list[str] = []
        for options in FORMATS.values():
            host = qsim.Host()
            recipe = compose(host, {"model": model}, **options)  # type: ignore[arg-type]
            result = qsim.evaluate(recipe, host=host, run=qsim.Run(limit=limit))
            print(f"{model} {options}: {result.simulated[result.metric]:.4g}", file=sys.stderr)
            if not cells:
                cells = [f"{model}: {result.metric.replace('_', ' ')}", f"{result.baseline[result.metric]:.4g}"]
            cells.append(f"{result.simulated[result.metric]:.4g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"families": families, "methods": methods, "weights": weights}


def main() -> None:
    """Compute the tables and put them into the document."""
    hush_libraries()
    warnings.simplefilter("ignore", qsim.CalibrationWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}; all of them if none is given"
    )
    parser.add_argument("--limit", type=int, help="evaluate so many windows only, for a trial")
    arguments = parser.parse_args()
    for name in arguments.names or TABLES:
        table = TABLES[name](arguments.limit)
        text = DOCUMENT.read_text(encoding="utf-8")
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        DOCUMENT.write_text(marked.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text), encoding="utf-8")  # noqa: B023


if __name__ == "__main__":
    main()
