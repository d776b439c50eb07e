"""Train the zoo's models: `python -m qsim_zoo.train opt-tiny`.

Training is seeded and resumable: every step draws its batch and its dropout from the step's own number,
and a checkpoint holds model, optimizer and step, so that a run that was stopped goes on where it was.
The weights with the lowest validation loss are the ones that are kept, in float16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qsim_zoo.causal import CodegenTiny, OptTiny
from qsim_zoo.classified import BertTinyClassifier
from qsim_zoo.diffusion import DdpmTiny
from qsim_zoo.lesson import Lesson
from qsim_zoo.masked import BertTiny
from qsim_zoo.vision import VitTiny

LESSONS: dict[str, Callable[[], Lesson]] = {
    lesson.name: lesson for lesson in (OptTiny, CodegenTiny, BertTiny, BertTinyClassifier, VitTiny, DdpmTiny)
}
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@dataclass
class Training:
    """A run in progress, and the file that lets it go on after it was stopped."""

    lesson: Lesson
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    checkpoint: Path
    plan: dict[str, int]
    """Steps and seed: a checkpoint goes on only under the same."""
    step: int = 0
    best: float = math.inf

    @classmethod
    def of(cls, lesson: Lesson, work: Path, steps: int, seed: int) -> Training:
        """A run at its beginning, or where its checkpoint is. Raises `click.ClickException` if that is of another."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = lesson.make().train()
        run = cls(lesson, model, lesson.optimizer(model), work / f"{lesson.name}.pt", {"steps": steps, "seed": seed})
        run.resume()
        return run

    def resume(self) -> None:
        """Take up the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved["plan"] != self.plan:
            raise click.ClickException(f"{self.checkpoint} is of a run with {saved['plan']}; give another --work")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]

    def keep(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.step, "best": self.best, "plan": self.plan}, part)
        part.replace(self.checkpoint)

    def advance(self) -> float:
        """One optimizer step on a batch (and with dropout) drawn from the seed and the step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lesson.learning_rate(self.step, self.plan["steps"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan["seed"] * 1_000_003 + self.step)
            loss = self.lesson.loss(self.model)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.item())

    @torch.no_grad()
    def validate(self) -> float:
        """The loss on the validation split."""
        self.model.eval()
        loss = self.lesson.validate(self.model)
        self.model.train()
        return loss


def train(lesson: Lesson, directory: Path, work: Path, steps: int, seed: int, every: int) -> float:
    """Train (or go on training) a model into `directory`; returns the best validation loss."""
    lesson.prepare(directory)
    run = Training.of(lesson, work, steps, seed)
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=steps, completed=run.step)
        while run.step < steps:
            loss = run.advance()
            progress.update(bar, advance=1, description=f"loss {loss:.3f}, best validation {run.best:.3f}")
            if run.step % every == 0 or run.step == steps:
                valid = run.validate()
                progress.console.print(f"step {run.step}: loss {loss:.3f}, validation {valid:.3f}")
                if valid < run.best:
                    run.best = valid
                    lesson.save(run.model, directory)
                run.keep()
    return run.best


@click.command()
@click.argument("name", type=click.Choice(list(LESSONS)))
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).with_name("models"), show_default=True
)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("zoo-training"), help="Where checkpoints are kept."
)
@click.option("--steps", type=click.IntRange(1), help="Default: as the committed weights were trained.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=100, help="Steps between validations.", show_default=True)
def main(name: str, output: Path, work: Path, steps: int | None, seed: int, every: int) -> None:
    """Train a model of the zoo; a stopped run goes on from its last checkpoint."""
    lesson = LESSONS[name]()
    steps = steps or lesson.steps
    best = train(lesson, output / name, work, steps, seed, every)
    click.echo(json.dumps({"model": name, "steps": steps, "seed": seed, lesson.measure: lesson.report(best)}))


if __name__ == "__main__":
    main()
