"""Run every method on the zoo's models, and write the tables of docs/results.md.

    python benchmarks/results.py [--limit WINDOWS] [--runs DIR [--finished]] [NAME …]

The script fills in all tables of docs/results.md, or the named ones, between their markers. Each number is one
`qsim.evaluate` on the whole test split, with 32 windows of the train split as calibration data. All of them take about
half an hour on two cores. Each number of `training` is one `qsim finetune`. Its output is kept under DIR, and it is not
run again. As many run at a time as there are cores; they take one hour more.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import qsim_core as qsim
from qsim_core.cli.progress import hush_libraries
from qsim_core.cli.recipe_options import compose

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
TRAINED = {
    "opt-tiny": ("--batch-size 8 --steps 300", 2e-4, 1.5e-3),
    "vit-tiny": ("--batch-size 32 --steps 300", 2e-4, 1e-3),
    "opt-tiny-outliers": ("--batch-size 8 --steps 300", 2e-4, 1.5e-3),
}
"""Options of each training, and the highest learning rates towards labels and towards float32 outputs."""
BITS = ["w4a4", "w3a4"]
UNTRAINED: dict[str, list[str]] = {
    "PTQ: rounding to nearest": [],
    "PTQ: SmoothQuant, GPTQ": ["smoothquant", "gptq"],
    "ABFP": ["abfp"],
    "ABFP-SQ": ["abfp", "smoothquant"],
}
TRAININGS = {
    "float32 finetune, not rounded": "--control",
    "float32 finetune, then ABFP": "--control",
    "ABFP-QAT": "",
    "ABFP-SQ-QAT": "--plugin smoothquant",
    "DNF": "--plugin dnf",
    "ABFP-QAT, distilled": "--distill",
    "ABFP-SQ-QAT, distilled": "--plugin smoothquant --distill",
}


def perplexity(model: str, limit: int | None, **options: object) -> str:
    """Give one cell: the simulated perplexity, or a dash after an error."""
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
    """Make the table of methods (rows) and precisions (columns), for each model."""
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
    """Make the table of weight formats (rows) and methods (columns), for each model; activations stay in float32."""
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
    """Make the table of models (rows), each with the metric of its field, and formats (columns)."""
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


def training(limit: int | None, runs: Path, finished: bool) -> str:
    """Make the table of methods (rows), and models with precisions (columns): the metric after training."""
    columns = [(model, precision) for model in TRAINED for precision in BITS]
    if not finished:
        jobs = dict.fromkeys((*column, how) for how in TRAININGS.values() for column in columns)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            trained = [job for job in jobs if job[1:] != (BITS[1], "--control")]  # the same training serves both
            for job in [pool.submit(_finetune, *job, limit, runs) for job in trained]:
                job.result()
    rows: dict[str, list[str]] = {name: [] for name in ("float32", *UNTRAINED, *TRAININGS)}
    for model, precision in columns:
        for name, plugins in UNTRAINED.items():
            before = _evaluated(model, precision, plugins, limit)
            rows[name].append(_four(before, "simulated"))
        rows["float32"].append(_four(before, "baseline"))
        for name, how in TRAININGS.items():
            if how == "--control":
                after = _control(model, precision, limit, runs)
            else:
                after = _read(_directory(model, precision, how, runs) / "after.json")
            rows[name].append(_four(after, "baseline" if name.endswith("not rounded") else "simulated"))
    titles = [f"{model} {precision.upper()}" for model, precision in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items())])


def _directory(model: str, precision: str, how: str, runs: Path) -> Path:
    return runs / "-".join([model, precision, *re.findall(r"\w+", how.replace("plugin", ""))])


def _finetune(model: str, precision: str, how: str, limit: int | None, runs: Path) -> None:
    """Run one training, unless it has been run before."""
    output = _directory(model, precision, how, runs)
    if (output / "after.json").exists():
        return
    common, towards_labels, towards_outputs = TRAINED[model]
    rate = towards_outputs if "--distill" in how else towards_labels
    command = f"finetune {model} --plugin abfp --precision {precision} {common} --lr {rate} {how} --quiet --resume"
    some = [] if limit is None else ["--limit", str(limit)]
    arguments = [sys.executable, "-m", "qsim_core", *command.split(), *some, "--output", str(output)]
    subprocess.run(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    print(f"{output.name} done", file=sys.stderr)


def _control(model: str, precision: str, limit: int | None, runs: Path) -> qsim.Result | None:
    """Evaluate a model that was trained in float32, under a precision."""
    directory = _directory(model, BITS[0], "--control", runs)
    if (after := _read(directory / "after.json")) is None or precision == BITS[0]:
        return after
    return _evaluated(str(directory), precision, ["abfp"], limit)


def _evaluated(model: str, precision: str, plugins: list[str], limit: int | None) -> qsim.Result:
    host = qsim.Host()
    recipe = compose(host, {"model": model}, plugins=plugins, precision=precision)
    return qsim.evaluate(recipe, host=host, run=qsim.Run(limit=limit))


def _read(path: Path) -> qsim.Result | None:
    return qsim.Result.read(path) if path.exists() else None


def _four(result: qsim.Result | None, which: str) -> str:
    return "—" if result is None else f"{getattr(result, which)[result.metric]:.4g}"


TABLES = {"families": families, "methods": methods, "weights": weights}


def main() -> None:
    """Compute the tables and put them into the document."""
    hush_libraries()
    warnings.simplefilter("ignore", qsim.CalibrationWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}, training; all of them if none is given"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trainings are kept")
    parser.add_argument("--finished", action="store_true", help="train nothing: tabulate the runs that have ended")
    parser.add_argument("--limit", type=int, help="evaluate only so many windows, for a trial")
    arguments = parser.parse_args()
    tables = TABLES | {"training": functools.partial(training, runs=arguments.runs, finished=arguments.finished)}
    for name in arguments.names or tables:
        table = tables[name](arguments.limit)
        text = DOCUMENT.read_text(encoding="utf-8")
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        DOCUMENT.write_text(marked.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text), encoding="utf-8")  # noqa: B023


if __name__ == "__main__":
    main()
