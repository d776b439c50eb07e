"""The search: measure sensitivities, solve, check the solution, refine, and run the best on the evaluation's data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite, isnan, nan
from typing import Any

from qsim_core import Bench, Calibration, DataError, Hardware, Host, QsimError, Recipe, Run
from qsim_core.components.host import installed
from qsim_core.evaluation.bench import Measured
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.metrics import intervals
from qsim_core.evaluation.record import calibration_record
from qsim_study.search import sensitivities
from qsim_study.search.allotting import cheapest_loss
from qsim_study.search.choices import Allotment, Choice, Group, Offered, combinations, offered, recipe_of
from qsim_study.search.found import Budget, Found, GroupRecord, Round, Uniform
from qsim_study.search.groups import groups_of
from qsim_study.search.prices import Price, Works, check_smallest, prices, products
from qsim_study.search.trials import Trials


def search(
    model: str | None = None,
    *,
    budget: Budget,
    weights: Iterable[Any] = (),
    activations: Iterable[Any] = (),
    recipe: Recipe | Mapping[str, Any] | None = None,
    host: Host | None = None,
    data: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    calibration: Calibration | None = None,
    run: Run | None = None,
    on: Sequence[Hardware] = (),
    rounds: int = 2,
) -> Found:
    """Allot number formats by site, so that the model loses least under a budget.

    `weights` and `activations` are the formats or schemes to choose from, as components or texts. `recipe` says all
    else, such as outputs, skipped sites and transforms; its overrides hold. `calibration` names the samples on which
    losses are measured: the evaluation's `data` have no part in the search. `rounds` is how often sensitivities are
    measured again around the best allotment. Raises a `QsimError`.
    """
    host, run, given, start = host or installed(), run or Run(), calibration or Calibration(), time.perf_counter()
    base = Recipe.of({} if recipe is None else recipe, host)
    choices = offered({"weights": weights, "activations": activations}, host)
    bench = Bench(base.model if model is None else model, host=host, device=device, dtype=dtype)
    job = Job.at(bench.located, base.model_copy(update=combinations(choices)[-1]), host)
    base = job.recipe
    with run.stage(f"loading {bench.located.name}"):
        dataset, seen = job.data(data), job.calibration_data(given, "a search")
        loaded = bench.load()
        example = job.evaluator.example(loaded, dataset)
    if example is None:
        raise DataError(f"{job.evaluator} gives no example batch, in which a search finds the sites")
    with run.stage("looking for sites"):
        groups, elements = groups_of(loaded.model, base, choices, example)
        priced = prices(budget, elements, on)
        works = Works(loaded.model, base, choices, groups, example, on)
        check_smallest(priced, works, choices)
    with run.stage("drawing samples"):
        trials = Trials(job, loaded, seen, given, run, example, host)
    allotting = _Search(base, groups, choices, works, priced, trials, run)
    allotting.go(rounds)
    best = allotting.best

    def measure(allotted: Allotment) -> Measured:
        return bench.measure(recipe_of(base, groups, allotted), data, calibration=given, run=run, on=on)

    found = measure(best)
    uniform = [
        _compared(measure(allotted), found, choice, fits, allotting.costs(allotted))
        for choice, allotted, fits in allotting.beside()
    ]
    warnings = list(found.result.warnings)
    if seen.sha256 == dataset.sha256:
        warnings.append(f"the search looked at the data that are reported, {dataset.name}")
    return Found(
        recipe=recipe_of(base, groups, best).to_yaml(),
        result=found.result,
        budget=budget,
        costs=allotting.costs(best),
        groups=[allotting.record(group) for group in groups],
        uniform=uniform,
        higher_is_better=job.evaluator.higher_is_better,
        samples=calibration_record(given, seen).model_copy(update={"samples": trials.samples}),
        losses=allotting.losses,
        rounds=allotting.rounds,
        runs=trials.runs,
        seconds=time.perf_counter() - start,
        warnings=warnings,
    )


class _Search:
    """The allotments that were tried, and the best of them on the samples of the search."""

    def __init__(
        self,
        base: Recipe,
        groups: Sequence[Group],
        offered: Offered,
        works: Works,
        priced: Sequence[Price],
        trials: Trials,
        run: Run,
    ) -> None:
        self.base, self.groups, self.offered, self.works = base, groups, offered, works
        self.priced, self.trials, self.run = priced, trials, run
        self.best: Allotment = {}
        self.rounds: list[Round] = []
        self.losses: dict[str, float] = {}
        """Mean losses of the samples: under the best uniform recipe, and under the recipe that was found."""
        self._least = inf
        self._uniform: list[tuple[Choice, Allotment]] = []
        self._best_uniform: Choice | None = None
        self._alone: sensitivities.Rises = {}

    def go(self, rounds: int) -> None:
        """Find the best allotment: from sensitivities in the unquantized model, then around the best one so far."""
        self._uniforms()
        self._alone = self._rises({}, 0.0)
        self._solve("the unquantized model", self._alone, 0.0)
        if not self.best:
            raise QsimError("no allotment keeps all budgets with a finite loss; raise one, or offer other formats")
        for _ in range(rounds):
            rises = self._rises(self.best, self._least)
            if not self._solve("the best allotment so far", rises, self._least):
                break
        self.losses["found"] = self._least

    def costs(self, allotted: Allotment) -> dict[str, float]:
        """The price of an allotment, in each quantity."""
        works = self.works.under(allotted)
        return {price.name: price.of(works) for price in self.priced}

    def beside(self) -> list[tuple[Choice, Allotment, bool]]:
        """The uniform allotments to compare with, and if they keep the budget.

        They are the best one that does, and the one that is least above.
        """
        above = [one for one in self._uniform if not self._fits(one[1])]
        nearest = min(above, key=lambda one: self._excess(one[1]), default=None)
        within = [(*one, True) for one in self._uniform if one[0] == self._best_uniform]
        return within + ([] if nearest is None else [(*nearest, False)])

    def record(self, group: Group) -> GroupRecord:
        """Describe the choice of a group."""
        choice = self.best[group]
        widths = [
            (one.elements, one.bits)
            for work in products(self.works.of(group, choice))
            for one in work.operands
            if one.role == "weight"
        ]
        alone = sensitivities.predicted(self._alone, self.offered, group, choice)
        return GroupRecord(
            group=group.name,
            sites=list(group.sites),
            choice={key: None if one is None else str(one) for key, one in choice.items()},
            bits=sum(many * bits for many, bits in widths) / sum(many for many, _ in widths) if widths else None,
            sensitivity=nan if alone is None else alone,
        )

    def _uniforms(self) -> None:
        """Measure the uniform recipes that keep the budget; the best of them is the first candidate."""
        self._uniform = [
            (choice, {group: {key: choice[key] for key in group.keys} for group in self.groups})
            for choice in combinations(self.offered)
            if any(one is not None for one in choice.values())
        ]
        within = [one for one in self._uniform if self._fits(one[1])]
        for choice, allotted in self.run.track(within, len(within), "uniform recipes"):
            if self._better(allotted, loss := self._loss(allotted)):
                self._best_uniform, self.losses["uniform"] = choice, loss

    def _rises(self, around: Allotment, before: float) -> sensitivities.Rises:
        return sensitivities.measured(self._loss, self.groups, self.offered, around, before, self.run)

    def _solve(self, around: str, rises: sensitivities.Rises, before: float) -> bool:
        """Solve the integer program for sensitivities, and measure its solution. True if it is the best so far."""
        options: list[list[tuple[Choice, float]]] = []
        for group in self.groups:
            every = group.choices(self.offered)
            tried = ((one, sensitivities.predicted(rises, self.offered, group, one)) for one in every)
            options.append([(one, rise) for one, rise in tried if rise is not None])
        limited = [price for price in self.priced if isfinite(price.most)]
        rows = list(zip(self.groups, options, strict=True))
        costs = [[[price.of(self.works.of(group, one)) for one, _ in row] for group, row in rows] for price in limited]
        chosen = cheapest_loss(
            [[rise for _, rise in row] for row in options],
            costs,
            [price.most - price.of(self.works.fixed) for price in limited],
        )
        if chosen is None:
            return False
        picked = [row[place] for row, place in zip(options, chosen, strict=True)]
        allotted = {group: one for group, (one, _) in zip(self.groups, picked, strict=True)}
        if allotted == self.best:
            return False
        loss = self._loss(allotted)
        self.rounds.append(Round(around=around, predicted=before + sum(rise for _, rise in picked), loss=loss))
        return self._fits(allotted) and self._better(allotted, loss)

    def _better(self, allotted: Allotment, loss: float) -> bool:
        """Keep an allotment if its loss is the least so far."""
        better = not isnan(loss) and loss < self._least
        if better:
            self.best, self._least = allotted, loss
        return better

    def _loss(self, allotted: Allotment) -> float:
        return self.trials.loss(recipe_of(self.base, self.groups, allotted))

    def _fits(self, allotted: Allotment) -> bool:
        works = self.works.under(allotted)
        return all(price.allows(works) for price in self.priced)

    def _excess(self, allotted: Allotment) -> float:
        """The price over the budget, of the quantity where it is largest."""
        works = self.works.under(allotted)
        return max(price.of(works) / price.most for price in self.priced)


def _compared(uniform: Measured, found: Measured, choice: Choice, fits: bool, costs: dict[str, float]) -> Uniform:
    """A uniform recipe's record, with the interval of found over uniform, sample by sample."""
    metric = found.result.metric
    ratio = intervals(uniform.simulated, found.simulated).get(metric, {}).get("ratio")
    return Uniform(
        choice={key: None if one is None else str(one) for key, one in choice.items()},
        fits=fits,
        costs=costs,
        value=uniform.simulated[metric],
        ratio=ratio,
    )
