"""Keep the numbers of docs/studies/methods.yaml in docs/studies/methods.json, and write the tables of docs/methods.md.

    qsim study docs/studies/methods.yaml --output DIR
    python benchmarks/methods.py DIR            # keep the study's numbers, and write the tables
    python benchmarks/methods.py --costs        # measure what each method takes, if that is not kept
    python benchmarks/methods.py                # write the tables again from the numbers that are kept

Time is that of the processor, in one thread, and memory is the growth of the process's peak: on opt-tiny under MXFP4,
from the loaded model to the simulated one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from qsim_study.cell import Cell, Entry
from qsim_study.comparison import compare, comparisons, ranks
from qsim_study.folder import Folder
from qsim_study.specification import Specification

import qsim_core as qsim
from qsim_core.cli.progress import hush_libraries
from qsim_core.evaluation.job import Job

ROOT = Path(__file__).parent.parent
PAGE, STUDY = ROOT / "docs" / "methods.md", ROOT / "docs" / "studies" / "methods.yaml"
KEPT = STUDY.with_suffix(".json")
NEAREST = "rounding to nearest"
MEASURED_ON = ("opt-tiny", "mxfp4")


class Row(BaseModel):
    """One method on one model under one format."""

    model: str
    format: str
    method: str
    failure: str | None = None
    value: float | None = None
    ratio: tuple[float, float, float] | None = None
    """The ratio of the metric to that of rounding to nearest, and its paired 95% interval, not corrected."""
    rank: int | None = None
    """1 and the number of methods of the same model and format that are decided to be better (Holm, 5%)."""
    tied: bool = False
    bits: tuple[float, float] | None = None
    """Bits of an element of weights and of activations, with scales and everything that stands beside them."""


class Loss(BaseModel):
    """A model's metric in float32, and the samples of which it is the metric."""

    metric: str
    baseline: float
    samples: int


class Kept(BaseModel):
    """Everything that the page shows."""

    calibration_samples: int
    models: dict[str, Loss] = {}
    rows: list[Row] = []
    costs: dict[str, tuple[float, float] | str] = {}
    """Seconds of the processor and MiB for each method, or the reason why it refused."""

    def columns(self) -> dict[tuple[str, str], dict[str, Row]]:
        """The rows of each model and format, by method."""
        found: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault((row.model, row.format), {})[row.method] = row
        return found

    def share(self, row: Row) -> float | None:
        """The share that is recovered of what rounding to nearest loses, in per cent; None if it loses nothing."""
        nearest = self.columns()[row.model, row.format].get(NEAREST)
        if nearest is None or nearest.value is None or row.value is None:
            return None
        lost = nearest.value - self.models[row.model].baseline
        return 100 * (nearest.value - row.value) / lost if lost > 0 else None


def named(transforms: Iterable[Any], scales: str = "") -> str:
    """The name of a method: its transforms, and the scales that it brings along."""
    inside = ", ".join(map(str, transforms))
    method = f"`{inside}`" if inside else NEAREST
    return f"{method}, {scales}" if scales else method


def kept_of(folder: Folder, costs: dict[str, tuple[float, float] | str]) -> Kept:
    """The numbers of a study's folder, without cells that are not computed yet, and columns with fewer than two."""
    found = Kept(calibration_samples=next(iter(folder.cells.values())).circumstances.calibration_samples, costs=costs)
    columns: dict[tuple[str | None, str], dict[str, tuple[Cell, Entry]]] = {}
    for key, entry in folder.entries().items():
        cell = folder.cells[key]
        columns.setdefault((cell.model, cell.varied["recipe"].partition(" with ")[0]), {})[key] = cell, entry
    for (model, recipe), column in columns.items():
        if len(column) < 2:
            continue
        entries = {key: entry for key, (_, entry) in column.items() if entry.result is not None}
        ranked = ranks(entries, comparisons(entries))
        names = {key: named([cell.varied["transforms"][1:-1]], _scales(cell)) for key, (cell, _) in column.items()}
        nearest = next((entries[key] for key in entries if names[key] == NEAREST), None)
        for key, (_, entry) in column.items():
            row = Row(model=str(model), format=recipe, method=names[key], failure=entry.failure)
            if (result := entry.result) is not None and entry.scores is not None:
                audit = result.audit
                found.models[row.model] = Loss(
                    metric=result.metric, baseline=result.baseline[result.metric], samples=result.samples
                )
                compared = None if nearest is None or nearest is entry else compare(entry, nearest)
                row.value, row.ratio = entry.scores.values[result.metric], compared and compared[:3]
                row.rank, row.tied = ranked.get(key, (None, False))
                if audit.bits_per_weight is not None and audit.bits_per_activation is not None:
                    row.bits = audit.bits_per_weight, audit.bits_per_activation
            found.rows.append(row)
    return found


def _scales(cell: Cell) -> str:
    return cell.varied["recipe"].partition(" with ")[2]


def text_of(row: Row, kept: Kept) -> str:
    """The metric, the share that is recovered, the interval of the ratio to rounding to nearest, and the rank."""
    if row.value is None:
        return "refused"
    value = f"{row.value:.2f}" if row.value < 1000 else f"{row.value:.0f}"
    text = f"**{value}**" if row.rank == 1 else value
    share = kept.share(row)
    if row.ratio is not None and share is not None:
        text += f", {round(share)}% [{row.ratio[1]:.3f}, {row.ratio[2]:.3f}]"
    return text if row.rank is None else f"{text}, {row.rank}{'=' if row.tied else ''}"


def losses(kept: Kept) -> str:
    """A table for each model: methods and formats."""
    columns, tables = kept.columns(), []
    for model, loss in kept.models.items():
        formats = {form: column for (of, form), column in columns.items() if of == model}
        title = f"{model}: {loss.metric.replace('_', ' ')} {loss.baseline:.2f}, {loss.samples} samples"
        lines = [f"| {title} | {' | '.join(formats)} |", "|---|" + "---:|" * len(formats)]
        for method in dict.fromkeys(method for column in formats.values() for method in column):
            cells = [text_of(column[method], kept) if method in column else "" for column in formats.values()]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def winners(kept: Kept) -> str:
    """The best method of each model and format, and those that the samples do not tell from the first rank."""
    lines = [
        "| model | format | least loss | recovers | of the same rank | rounding to nearest |",
        "|---|---|---|---:|---|---|",
    ]
    for (model, form), column in kept.columns().items():
        measured = [row for row in column.values() if row.value is not None]
        best = min(measured, key=lambda row: row.value or 0.0)
        also = [row.method for row in measured if row.rank == 1 and row is not best and row.method != NEAREST]
        share, nearest = kept.share(best), column.get(NEAREST)
        place = "" if nearest is None else "of the same rank" if nearest.rank == 1 else "decided to be worse"
        recovered = "" if share is None else f"{round(share)}%"
        lines.append(f"| {model} | {form} | {best.method} | {recovered} | {', '.join(also)} | {place} |")
    return "\n".join(lines)


def standings(kept: Kept) -> str:
    """For each method how often it is of the first rank, and decided to be better or worse than rounding to nearest."""
    lines = [
        "| method | columns | of the first rank | better than nearest | worse | median share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    by_method: dict[str, list[Row]] = {}
    for row in kept.rows:
        if row.value is not None:
            by_method.setdefault(row.method, []).append(row)
    found = []
    for method, rows in by_method.items():
        first = sum(row.rank == 1 for row in rows)
        better = sum(row.ratio is not None and row.ratio[2] < 1 for row in rows)
        worse = sum(row.ratio is not None and row.ratio[1] > 1 for row in rows)
        shares = [share for row in rows if row.ratio is not None and (share := kept.share(row)) is not None]
        median = f"{round(statistics.median(shares))}%" if shares else ""
        found.append((-first / len(rows), f"| {method} | {len(rows)} | {first} | {better} | {worse} | {median} |"))
    return "\n".join([*lines, *(line for _, line in sorted(found, key=lambda one: one[0]))])


def bits(kept: Kept) -> str:
    """Bits of an element of weights and activations, of the methods that change them."""
    plain = {key: column[NEAREST].bits for key, column in kept.columns().items() if NEAREST in column}
    lines = ["| model | format | method | bits of a weight | of an activation |", "|---|---|---|---:|---:|"]
    for row in kept.rows:
        before = plain.get((row.model, row.format))
        if row.bits is not None and (row.method == NEAREST or row.bits != before):
            lines.append(f"| {row.model} | {row.format} | {row.method} | {row.bits[0]:.2f} | {row.bits[1]:.2f} |")
    return "\n".join(lines)


def refusals(kept: Kept) -> str:
    """The methods that refused a model or a format, and their reasons."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for row in kept.rows:
        if row.failure is not None:
            by_reason.setdefault((row.method, row.failure), []).append(f"{row.model} under {row.format}")
    lines = [f"- {method} on {', '.join(where)}: {reason}" for (method, reason), where in by_reason.items()]
    return "\n".join(lines) or "No method refused a model."


def costs(kept: Kept) -> str:
    """The table of what each method takes."""
    lines = ["| | seconds | MiB |", "|---|---:|---:|"]
    for method, cost in kept.costs.items():
        lines.append(
            f"| {method} | {cost} | |" if isinstance(cost, str) else f"| {method} | {cost[0]:.1f} | {cost[1]:.0f} |"
        )
    return "\n".join(lines)


TABLES = {
    "winners": winners,
    "standings": standings,
    "losses": losses,
    "refusals": refusals,
    "bits": bits,
    "costs": costs,
}


def page(text: str, kept: Kept) -> str:
    """The page with its tables, each between its markers."""
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n{table(kept)}\n<!-- end -->{after}"
    return text


def measure_costs(kept: Kept, specification: Specification) -> None:
    """Find seconds and MiB of each method that has none yet, each in a process of its own."""
    for transforms in specification.vary["transforms"]:
        if (name := named(transforms)) not in kept.costs:
            kept.costs[name] = _in_a_process(list(map(str, transforms)), kept.calibration_samples)
            print(name, kept.costs[name], flush=True)


def _in_a_process(transforms: list[str], samples: int) -> tuple[float, float] | str:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(transforms, samples, queue))
    process.start()
    found: tuple[float, float] | str = queue.get()
    process.join()
    return found


def _measure(transforms: list[str], samples: int, queue: Any) -> None:
    torch.set_num_threads(1)
    host = qsim.Host()
    model, form = MEASURED_ON
    recipe = {"weights": form, "activations": form, "outputs": "bf16", "transforms": transforms}
    job = Job.of(qsim.Recipe.of({"model": model, **recipe}, host), host)
    loaded = job.located.adapter.load(job.located.source, torch.float32)
    batches = job.evaluator.calibration(loaded, job.located.calibration(), samples, None, 0)
    qsim.simulate(loaded.model, recipe | {"transforms": []}, example=batches[0]).restore()
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        qsim.simulate(loaded.model, recipe, calibration=batches, example=batches[0])
    except qsim.QsimError as error:
        queue.put(str(error))
        return
    queue.put((time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    """Keep the numbers that are asked for, and write the tables."""
    hush_libraries()
    warnings.simplefilter("ignore", qsim.CalibrationWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the study's output")
    parser.add_argument("--costs", action="store_true", help="measure what each method takes")
    arguments = parser.parse_args()
    specification = Specification.read(STUDY)
    kept = Kept(calibration_samples=specification.circumstances.calibration_samples)
    if KEPT.exists():
        kept = Kept.model_validate_json(KEPT.read_bytes())
    if arguments.folder is not None:
        kept = kept_of(Folder.open(arguments.folder), kept.costs)
    if arguments.costs:
        measure_costs(kept, specification)
    KEPT.write_text(kept.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")


if __name__ == "__main__":
    main()
