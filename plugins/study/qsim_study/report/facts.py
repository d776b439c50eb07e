"""The facts about a study: its size, protocols, data, machines and versions, and all that is doubtful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from qsim_core import Result
from qsim_core.simulation.recipe import matches
from qsim_study.study_run import Study


def summary(study: Study) -> str:
    """The size of the study in one line."""
    results = _results(study)
    models = {cell.model for cell in study.cells.values()}
    failed = len(study.cells) - len(results)
    parts = [_count(len(study.cells), "cell"), _count(len(models), "model"), f"{failed} failed" if failed else ""]
    return ", ".join(part for part in parts if part)


def measured(study: Study) -> list[tuple[str, ...]]:
    """For each model and metric: model, protocol, data, samples; equal ones once."""
    return list(
        dict.fromkeys(
            (one.model, one.protocol, f"{one.data.name} (SHA-256 {one.data.sha256[:12]}…)", str(one.samples or ""))
            for one in _results(study)
        )
    )


def circumstances(study: Study) -> dict[str, list[str]]:
    """The machines, versions and calibration data of all cells, each once."""
    found: dict[str, dict[str, None]] = {}
    for result in _results(study):
        for name, text in _around(result):
            found.setdefault(name, {})[text] = None
    return {name: list(texts) for name, texts in found.items()}


def _around(result: Result) -> Iterator[tuple[str, str]]:
    here = result.environment
    threads = _count(here.threads, "thread")
    yield "Machine", f"{here.platform}, {here.device}, {here.dtype}, {threads}, Python {here.python}"
    yield "Libraries", ", ".join(f"{name} {version}" for name, version in here.versions.items())
    for plugin in result.plugins.values():
        yield "Distributions", f"{plugin.distribution} {plugin.version}"
    yield "Seed", str(result.seed)
    if (drawn := result.calibration) is not None:
        length = "" if drawn.length is None else f" of {drawn.length} tokens"
        seed = "" if drawn.seed is None else f", seed {drawn.seed}"
        yield "Calibration", f"{_count(drawn.samples, 'sample')}{length} of {drawn.name}{seed}"


def warnings(study: Study) -> list[str]:
    """Notes of the study, warnings of results with the number of cells, and patterns that named no site."""
    counted = Counter(warning for result in _results(study) for warning in dict.fromkeys(result.warnings))
    found = [f"{warning} ({_count(many, 'cell')})" for warning, many in counted.items()]
    reasons = (entry.blame.reason for entry in study.entries.values() if entry.blame is not None)
    refused = Counter(f"no predicted cost of sites: {reason}" for reason in reasons if reason is not None)
    found += [f"{reason} ({_count(many, 'cell')})" for reason, many in refused.items()]
    return [*study.notes, *found, *dict.fromkeys(_without_site(study))]


def _without_site(study: Study) -> Iterator[str]:
    for entry in study.entries.values():
        if entry.result is None:
            continue
        names = [name for site in entry.result.audit.sites for name in (site.site, *site.aliases)]
        for pattern in entry.cell.circumstances.histograms:
            if not matches(pattern, names):
                yield f"histograms: no site of {entry.result.model} is named {pattern}"


def _results(study: Study) -> list[Result]:
    return [entry.result for entry in study.entries.values() if entry.result is not None]


def _count(many: int, noun: str) -> str:
    return f"{many} {noun}{'' if many == 1 else 's'}"
