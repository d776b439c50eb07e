"""Find the accumulator that each model of the zoo needs, and write the tables of docs/hardware.md.

    python benchmarks/hardware.py [--limit SAMPLES] [TABLE …]

Each cell is one `qsim.evaluate` on the first SAMPLES (16) of the test split: the metric under the recipe over that of
the float32 model, of the same samples, with its 95% interval. All tables take about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from pathlib import Path

import qsim_core as qsim
from qsim_core.cli.progress import hush_libraries
from qsim_core.cli.result_table import with_interval

DOCUMENT = Path(__file__).parent.parent / "docs" / "hardware.md"
MODELS = ["opt-tiny", "codegen-tiny", "bert-tiny", "vit-tiny"]
SATURATING = [f"int{bits}(overflow=saturate)" for bits in (20, 16, 14, 12)]
INT8 = {"weights": "int8", "activations": "int8"}
TABLES = {
    "w4a4": {"weights": "int4", "activations": "int4"},
    "w4a8": {"weights": "int4", "activations": "int8"},
}
"""Table -> the recipe."""
OPERATIONS = {
    "torch's own": "",
    "softmax `table(8, base=2)`": "softmax: table(8, base=2)",
    "softmax `table(64, base=2)`": "softmax: table(64, base=2)",
    "`ibert`": "softmax|gelu: ibert",
    "norms `newton(1)`": "norm: newton(1)",
    "norms `newton(2)`": "norm: newton(2)",
    "sums in BF16": "add: bf16",
    "sums in E4M3": "add: token(e4m3)",
}


def evaluated(model: str, recipe: dict[str, object], limit: int, directory: str) -> qsim.Result:
    """Evaluate a recipe; the model's baseline is measured once."""
    found = qsim.evaluate({"model": model, **recipe}, run=qsim.Run(limit=limit, work_dir=Path(directory)))
    print(f"{model} {recipe}: {found.ratio:.4f}", file=sys.stderr)
    return found


def ratio(result: qsim.Result) -> str:
    """Give the metric over the float32 model's, and its interval."""
    spread = result.intervals.get(result.metric)
    return with_interval(result.ratio, spread.ratio if spread else None)


def accumulators(name: str, limit: int, directory: str) -> str:
    """Make a table: a row for each model, a column for each arithmetic, and the bits that the sums need."""
    columns = ["float32", *SATURATING]
    shown = [f"`{column}`".replace("(overflow=saturate)", "") for column in columns]
    rows = ["| model | metric | " + " | ".join(shown) + " | bits |"]
    rows.append("|---|---" + "|---" * (len(columns) + 1) + "|")
    for model in MODELS:
        results = [evaluated(model, {**TABLES[name], "arithmetic": column}, limit, directory) for column in columns]
        bits = [site.sums.bits for result in results for site in result.audit.sites if site.sums and site.sums.bits]
        cells = [model, results[0].metric, *map(ratio, results), str(max(bits))]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def operations(limit: int, directory: str) -> str:
    """Make a table: a row for each way to compute operations, a column for each model."""
    rows = ["| under W8A8 | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    for title, text in OPERATIONS.items():
        kinds, _, way = text.partition(": ")
        cells = []
        for model in MODELS:
            changes = {kind: {"output": way} if kind == "add" else way for kind in kinds.split("|") if kind}
            try:
                cells.append(ratio(evaluated(model, {**INT8, "operations": changes}, limit, directory)))
            except qsim.RecipeError as error:  # a model without gelu
                print(f"{model} {text}: {error}", file=sys.stderr)
                cells.append("—")
        rows.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join([*TABLES, "operations"]))
    parser.add_argument("--limit", type=int, default=16)
    options = parser.parse_args()
    hush_libraries()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        for name in options.tables or [*TABLES, "operations"]:
            make = operations if name == "operations" else lambda *rest, name=name: accumulators(name, *rest)
            made = make(options.limit, directory)
            text = DOCUMENT.read_text()
            marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            DOCUMENT.write_text(marked.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text))


if __name__ == "__main__":
    main()
