"""What the command line shows of a run: its table, and the lines under it."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from qsim_core.cli import progress
from qsim_core.cli.console import console
from qsim_core.cli.recipe_options import compose
from qsim_core.components.host import Host
from qsim_core.errors import CalibrationWarning, RecipeError, file_did_you_mean
from qsim_core.evaluation.data import Calibration
from qsim_core.evaluation.evaluate import evaluate
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.record import recipe_of as recipe_of_record
from qsim_core.evaluation.record import same_data
from qsim_core.evaluation.result import Result
from qsim_core.evaluation.trained import Trained
from qsim_core.simulation.recipe import Recipe, read_yaml
from qsim_core.tensorfile.tensorfile import quantize_file
from qsim_core.transforms.report import LayerReport
from qsim_core.transforms.run import Run

SHOWN_WARNINGS = 4
FEW = 10
"""Of fewer samples a bootstrap's intervals are not to be trusted: they are drawn from too few values."""
FREE_BESIDE_A_RECORD = frozenset({"record", "device", "dry_run", "work_dir", "samples", "allow_code_execution"})
"""The options that say nothing that a record says; a record allows nothing."""


def run(options: dict[str, Any], given: set[str], quiet: bool) -> Result | None:
    """Carry out `qsim evaluate` with its options; None after a dry run."""
    host = Host()
    before = None
    if options["record"] is not None:
        if clash := given - FREE_BESIDE_A_RECORD:
            raise RecipeError(f"--from runs a record as it is; leave {', '.join(sorted(clash))} out")
        before = Result.read(options["record"])
        recipe = recipe_of_record(before, host)
        options = options | _recorded(before) | ({"device": options["device"]} if "device" in given else {})
    else:
        recipe = recipe_of(options, host)
    if options["dry_run"]:
        click.echo(Job.of(recipe, host).recipe.to_yaml(), nl=False)
        return None
    progress.hush_libraries()
    warnings.simplefilter("ignore", CalibrationWarning)  # the result holds them; they are printed below
    result = evaluate(
        recipe,
        host=host,
        data=options["data"],
        device=options["device"],
        dtype=options["dtype"],
        calibration=calibration_of(options),
        samples=options["samples"],
        run=Run(
            options["batch_size"],
            options["limit"],
            options["seed"],
            work_dir=options["work_dir"],
            allow_code_execution=options["allow_code_execution"],
            **({} if quiet else progress.SHOWN),
        ),
    )
    if before is not None:
        same_data(before, result)
        for line in _differences(before, result):
            click.echo(f"Warning: {line}", err=True)
    for line in result.warnings[:SHOWN_WARNINGS]:
        click.echo(f"Warning: {line}", err=True)
    if len(result.warnings) > SHOWN_WARNINGS:
        click.echo(f"Warning: {len(result.warnings) - SHOWN_WARNINGS} more like these (--json has them)", err=True)
    return result


def _recorded(before: Result) -> dict[str, Any]:
    """The options that a record was made with."""
    options = {
        "data": before.data.source,
        "limit": before.limit,
        "batch_size": before.batch_size,
        "seed": before.seed,
        "dtype": before.environment.dtype,
        "device": before.environment.device,
    }
    if (looked_at := before.calibration) is not None:
        options["calibration_data"] = looked_at.source
        options["calibration_samples"], options["calibration_seqlen"] = looked_at.samples, looked_at.length
    return options


def calibration_of(options: dict[str, Any]) -> Calibration:
    """The calibration data that the options name."""
    return Calibration(options["calibration_data"], options["calibration_samples"], options["calibration_seqlen"])


def recipe_of(options: dict[str, Any], host: Host) -> Recipe:
    """The recipe that the command line's options say. Raises a `QsimError`."""
    values = _recipe_file(options["recipe"]) if options["recipe"] is not None else {}
    texts = {role: options[role] for role in ("weights", "activations", "outputs")}
    for option in ("model", "evaluator", "value_axis", "arithmetic", "kv_cache"):
        if options[option] is not None:
            values["evaluate" if option == "evaluator" else option] = options[option]
    if options["skip"]:
        values["skip"] = [] if options["skip"] == ("none",) else list(options["skip"])
    # the evaluator and skip that an adapter chooses are filled in first, so that --set can reach them
    if options["settings"] and "evaluate" not in values:
        values["evaluate"] = str(Job.of(Recipe.of({"model": values.get("model")}, host), host).evaluator)
    recipe = compose(
        host, values, options["plugins"], options["precision"], texts, options["settings"], options["static"]
    )
    trained = recipe.model is not None and Trained.of(Path(recipe.model).expanduser()) is not None
    if not recipe.quantizes and not recipe.transforms and not trained:
        raise RecipeError("nothing to do: say --plugin, --precision, --weights, --activations or --recipe")
    return recipe


def _recipe_file(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise RecipeError(f"cannot read {path}: {why}{file_did_you_mean(path)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no recipe: expected keys and values like `weights: abfp(int4)`")
    if "schema_version" in values:
        raise RecipeError(f"{path} is a result, not a recipe; --from {path} runs it again")
    Recipe.of({key: None for key in values if key not in Recipe.model_fields})  # an unknown key is an error by name
    return values


def _differences(before: Result, after: Result) -> Iterator[str]:
    """What is not the same here as when a record was made."""
    for name, plugin in before.plugins.items():
        now = after.plugins.get(name)
        if now != plugin:
            found = now.version if now else "not used"
            yield f"plugin {name!r} was {plugin.distribution} {plugin.version}, now {found}"
    for library, version in before.environment.versions.items():
        if after.environment.versions.get(library) != version:
            yield f"{library} was {version}, now {after.environment.versions.get(library)}"
    for what in ("device", "threads"):
        was, now = getattr(before.environment, what), getattr(after.environment, what)
        if was != now:
            yield f"{what} was {was}, now {now}: sums may be taken in another order"


def show(result: Result) -> None:
    """The table of one result on standard output."""
    audit, recipe = result.audit, result.recipe
    table = Table(title=result.model, title_justify="left", title_style="bold", show_header=False, min_width=60)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for key in ("weights", "activations", "outputs"):
        table.add_row(key, recipe[key] or "as they are")
    for transform in recipe["transforms"]:
        table.add_row("after", transform)
    table.add_section()
    spread = result.intervals.get(result.metric)
    before, after = result.baseline[result.metric], result.simulated[result.metric]
    table.add_row(f"{result.environment.dtype} {result.metric}", value(before, spread.baseline if spread else None))
    table.add_row(f"simulated {result.metric}", Text(value(after, spread.simulated if spread else None), "bold"))
    if not isnan(result.ratio):
        table.add_row("ratio", value(result.ratio, spread.ratio if spread else None))
    table.add_section()
    table.add_row("matmuls quantized", f"{audit.covered} of {audit.found}")
    table.add_row("bits per weight", _bits(audit.bits_per_weight))
    table.add_row("bits per activation", _bits(audit.bits_per_activation))
    table.add_section()
    before_that = " (of an earlier run)" if "baseline" in result.cached else ""
    table.add_row("seconds, baseline", f"{result.seconds['baseline']:.1f}{before_that}")
    table.add_row("seconds, simulated", f"{result.seconds['simulated']:.1f}")
    table.add_row("seconds, in all", f"{result.seconds['total']:.1f}")
    out = console()
    out.print(table)
    for line in _lines(result):
        out.print(line, style="dim", soft_wrap=True)


def _lines(result: Result) -> Iterator[str]:
    """What a careful reader must know beside the numbers."""
    audit = result.audit
    limit = result.limit
    some = "" if limit is None else f"; of {limit} sample{'s' if limit > 1 else ''} only (--limit)"
    yield f"{result.protocol}; {result.data.name} (sha256 {result.data.sha256[:12]}){some}"
    for pattern, exception in result.recipe.get("overrides", {}).items():
        said = ", ".join(f"{role} {text or 'as they are'}" for role, text in exception.items())
        yield f"otherwise at {pattern}: {said}"
    if result.metric in result.intervals:
        narrow = "" if limit is None or limit >= FEW else "; too narrow, of so few samples"
        over = "over the samples, the ratio's over the same ones before and after"
        yield f"in brackets: 95% confidence intervals {over}{narrow}"
    others = [key for key in result.simulated if key != result.metric]
    if others:
        yield "; ".join(_change(key, result.baseline.get(key), result.simulated[key]) for key in others)
    if result.recipe["skip"]:
        yield f"left alone: {', '.join(result.recipe['skip'])} (--skip none quantizes everything)"
    for transform in dict.fromkeys(report.transform for report in result.transforms):
        yield _done(transform, [report for report in result.transforms if report.transform == transform])
    if (arithmetic := result.recipe["arithmetic"]) not in ("auto", "float32"):
        took = sum(site.arithmetic == arithmetic for site in audit.sites)
        yield f"{took} of {audit.found} matmuls were computed in {arithmetic}; the others do not fit it here"
    if audit.uncovered:
        yield f"not reached: {', '.join(audit.uncovered)}"
    grouped: dict[str, list[str]] = {}
    for site in audit.sites:
        for note in site.notes:
            grouped.setdefault(note, []).append(site.site)
    for note, sites in grouped.items():
        yield f"{len(sites)} site{'s' if len(sites) > 1 else ''}, like {sites[0]}: {note}"


def _done(transform: str, reports: list[LayerReport]) -> str:
    """What one transform did, in one line: its error before and after in the middle, and what it left alone."""
    changed = [report for report in reports if report.before is not None and report.after is not None]
    line = f"{transform}: {len(changed)} layers"
    if changed:
        before, after = (statistics.median(getattr(r, key) for r in changed) for key in ("before", "after"))
        line += f", {changed[0].measure} {before:.3g} before and {after:.3g} after (median)"
    left = len(reports) - len(changed)
    return line + (f"; {left} left alone (--json says why)" if left else "")


def _change(key: str, before: float | None, after: float) -> str:
    """A metric before and after; a count, and whatever did not change, once."""
    if before is None or before == after:
        return f"{key} {after:.0f}" if after.is_integer() else f"{key} {after:.4g}"
    return f"{key} {before:.4g} -> {after:.4g}"


def value(number: float, spread: tuple[float, float] | None) -> str:
    """A number, and its confidence interval if that has two ends."""
    if spread is None or not (isfinite(spread[0]) and isfinite(spread[1])) or spread[0] == spread[1]:
        return f"{number:.4g}"
    return f"{number:.4g} [{spread[0]:.4g}, {spread[1]:.4g}]"


def _bits(bits: float | None) -> str:
    return "unknown" if bits is None else f"{bits:.3g}"


def quantize(host: Host, source: Path, target: Path, weights: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Carry out `qsim quantize` and say what was done to each tensor."""
    quantizer = None if weights == "none" else Recipe.of({"weights": weights}, host).weights
    if quantizer is None:
        raise RecipeError("--weights none rounds nothing; name a quantizer, like 'abfp(int4)'")
    run = Run(**({} if quiet else progress.SHOWN))
    done = quantize_file(source, target, quantizer, track=run.track, **options)
    if as_json:
        click.echo(json.dumps([asdict(tensor) for tensor in done], indent=2))
    elif not quiet:
        table = Table("tensor", "shape", "quantizer", "SQNR in dB", "bits", box=None, pad_edge=False)
        rounded = [tensor for tensor in done if tensor.quantizer is not None]
        for tensor in rounded:
            sqnr = "exact" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}"
            shape = " x ".join(map(str, tensor.shape))
            table.add_row(tensor.name, shape, tensor.quantizer, sqnr, _bits(tensor.bits))
        out = console()
        out.print(table)
        out.print(
            f"{len(rounded)} of {len(done)} tensors rounded, the others copied, to {target}",
            style="dim",
            soft_wrap=True,
        )
