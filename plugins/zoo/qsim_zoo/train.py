"""Train the zoo's models: `python -m qsim_zoo.train opt-tiny`.

Training is seeded, and can be resumed. Every step seeds its batch and its dropout with its own number. A checkpoint
holds model, optimizer and step, so a stopped run continues from there. The weights with the lowest validation loss are
saved, in float16.
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

from qsim_core.files import keep, kept
from qsim_zoo.causal import CodegenTiny, LlamaTiny, Opt1M, Opt2M, Opt14M, OptTiny, PhiTiny, Qwen3Tiny
from qsim_zoo.classified import BertTinyClassifier
from qsim_zoo.diffusion import DdpmTiny
from qsim_zoo.masked import BertTiny
from qsim_zoo.task import Task
from qsim_zoo.vision import VitTiny

TASKS: dict[str, Callable[[], Task]] = {
    task.name: task
    for task in (
        OptTiny,
        Opt1M,
        Opt2M,
        Opt14M,
        CodegenTiny,
        LlamaTiny,
        Qwen3Tiny,
        PhiTiny,
        BertTiny,
        BertTinyClassifier,
        VitTiny,
        DdpmTiny,
    )
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
    """A run in progress, and the checkpoint file from which it can be resumed."""

    task: Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    checkpoint: Path
    plan: dict[str, int]
    """Steps and seed. A checkpoint can be resumed only with the same steps and seed."""
    step: int = 0
    best: float = math.inf

    @classmethod
    def of(cls, task: Task, work: Path, steps: int, seed: int) -> Training:
        """Start a run, or resume its checkpoint. Raises `click.ClickException` if the checkpoint has another plan."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = task.make().train()
        run = cls(task, model, task.optimizer(model), work / f"{task.name}.pt", {"steps": steps, "seed": seed})
        run.resume()
        return run

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        saved = kept(self.checkpoint)
        if saved is None:
            return
        if saved["plan"] != self.plan:
            raise click.ClickException(f"{self.checkpoint} is of a run with {saved['plan']}; give another --work")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]

    def keep(self) -> None:
        """Write the checkpoint."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        keep(self.checkpoint, {**state, "step": self.step, "best": self.best, "plan": self.plan})

    def advance(self) -> float:
        """Make one optimizer step and return its loss. Batch and dropout are drawn by the seed and the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.learning_rate(self.step, self.plan["steps"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan["seed"] * 1_000_003 + self.step)
            loss = self.task.loss(self.model)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.item())

    @torch.no_grad()
    def validate(self) -> float:
        """Compute the loss on the validation split."""
        self.model.eval()
        loss = self.task.validate(self.model)
        self.model.train()
        return loss


def train(task: Task, directory: Path, work: Path, steps: int, seed: int, every: int) -> float:
    """Train a model, or resume its training, and save it in `directory`. Return the best validation loss."""
    task.prepare(directory)
    run = Training.of(task, work, steps, seed)
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
                    task.save(run.model, directory)
                run.keep()
    return run.best


@click.command()
@click.argument("name", type=click.Choice(list(TASKS)))
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).with_name("models"), show_default=True
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("zoo-training"), help="Directory of checkpoints.")
@click.option("--steps", type=click.IntRange(1), help="Default: the steps of the committed weights.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=100, help="Steps between validations.", show_default=True)
def main(name: str, output: Path, work: Path, steps: int | None, seed: int, every: int) -> None:
    """Train a model of the zoo. A stopped run continues from its last checkpoint."""
    task = TASKS[name]()
    steps = steps or task.steps
    best = train(task, output / name, work, steps, seed, every)
    click.echo(json.dumps({"model": name, "steps": steps, "seed": seed, task.measure: task.report(best)}))


if __name__ == "__main__":
    main()
