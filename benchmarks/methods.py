"""Tabulate docs/studies/methods.yaml, measure what each of its methods takes, and write both into docs/results.md.

    qsim study docs/studies/methods.yaml --output DIR
    python benchmarks/methods.py DIR

Cells that the folder does not hold yet are left blank. Time is that of the processor, in one thread, and memory is the
growth of the process's peak: on opt-tiny under MXFP4, from the loaded model to the simulated one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from qsim_study.cell import Cell, Entry
from qsim_study.comparison import compare
from qsim_study.folder import Folder
from qsim_study.specification import Specification

import qsim_core as qsim
from qsim_core.cli.progress import hush_libraries
from qsim_core.evaluation.job import Job

ROOT = Path(__file__).parent.parent
DOCUMENT, STUDY = ROOT / "docs" / "results.md", ROOT / "docs" / "studies" / "methods.yaml"
NEAREST = "rounding to nearest"
Column = dict[str, Entry]
"""The entries of one format, by method."""


def columns_of(entries: list[tuple[Cell, Entry]]) -> dict[str, Column]:
    """The entries of a model by format, and then by method; scales of a method's own are part of the method."""
    found: dict[str, Column] = {}
    for cell, entry in entries:
        recipe, _, scales = cell.varied["recipe"].partition(" with ")
        transforms = cell.varied["transforms"][1:-1]
        method = f"`{transforms}`" if transforms else NEAREST
        found.setdefault(recipe, {})[f"{method}, {scales}" if scales else method] = entry
    return found


def text_of(entry: Entry, column: Column) -> str:
    """The metric, the share of the loss that is recovered, and the interval of the ratio to rounding to nearest.

    The best is bold; `=` marks what the samples do not tell from it.
    """
    metric = entry.result.metric
    best = min(column.values(), key=lambda one: one.scores.values[metric])
    value, nearest = entry.scores.values[metric], column.get(NEAREST)
    text = f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    if entry is best:
        text = f"**{text}**"
    elif (ends := compare(entry, best)) is not None and ends[1] <= 1:
        text += " ="
    if nearest is None or nearest is entry:
        return text
    lost, ends = nearest.scores.values[metric] - entry.result.baseline[metric], compare(entry, nearest)
    share = round(100 * (nearest.scores.values[metric] - value) / lost)
    return f"{text}, {share}%" + ("" if ends is None else f" [{ends[1]:.3f}, {ends[2]:.3f}]")


def table(model: str, entries: list[tuple[Cell, Entry]]) -> str:
    """The table of one model: methods (rows) and formats (columns)."""
    columns, result = columns_of(entries), entries[0][1].result
    methods = dict.fromkeys(method for column in columns.values() for method in column)
    metric, baseline = result.metric, result.baseline[result.metric]
    lines = [
        f"| {model}: {metric.replace('_', ' ')} {baseline:.2f} | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for method in methods:
        cells = [text_of(column[method], column) if method in column else "" for column in columns.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(specification: Specification) -> str:
    """The table of what each method takes, each in a process of its own."""
    lines = ["| | seconds | MiB |", "|---|---:|---:|"]
    for transforms in specification.vary["transforms"]:
        seconds, size = _in_a_process(list(map(str, transforms)), specification.circumstances.calibration_samples)
        name = f"`{', '.join(map(str, transforms))}`" if transforms else NEAREST
        lines.append(f"| {name} | {seconds:.1f} | {size:.0f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def _in_a_process(transforms: list[str], samples: int) -> tuple[float, float]:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(transforms, samples, queue))
    process.start()
    process.join()
    found: tuple[float, float] = queue.get()
    return found


def _measure(transforms: list[str], samples: int, queue: Any) -> None:
    torch.set_num_threads(1)
    host = qsim.Host()
    recipe = {"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16", "transforms": transforms}
    job = Job.of(qsim.Recipe.of({"model": "opt-tiny", **recipe}, host), host)
    loaded = job.located.adapter.load(job.located.source, torch.float32)
    batches = job.evaluator.calibration(loaded, job.located.calibration(), samples, None, 0)
    qsim.simulate(loaded.model, recipe | {"transforms": []}, example=batches[0]).restore()
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    qsim.simulate(loaded.model, recipe, calibration=batches, example=batches[0])
    queue.put(
        (time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
    )


def write(name: str, text: str) -> None:
    """Put a table into the document, between its markers."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(marked.sub(lambda m: f"{m[1]}{text}\n{m[2]}", document), encoding="utf-8")


def main() -> None:
    """Write both tables."""
    hush_libraries()
    warnings.simplefilter("ignore", qsim.CalibrationWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the study's output; without it only costs are measured")
    parser.add_argument("--no-costs", action="store_true", help="leave the table of costs as it is")
    arguments = parser.parse_args()
    specification = Specification.read(STUDY)
    if arguments.folder is not None:
        host = qsim.Host()
        folder = Folder.make(arguments.folder, specification, specification.cells(host), host)
        done = [(folder.cells[key], entry) for key, entry in folder.entries().items() if entry.result is not None]
        by_model = {model: [pair for pair in done if pair[0].model == model] for model in specification.models}
        write("four-bits", "\n\n".join(table(model, entries) for model, entries in by_model.items() if entries))
    if not arguments.no_costs:
        write("costs", costs(specification))


if __name__ == "__main__":
    main()
