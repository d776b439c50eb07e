"""Train the zoo's models: `python -m qsim_zoo.train opt-tiny`.

Training is seeded and resumable: every step draws its windows and its dropout from the step's own number,
and a checkpoint holds model, optimizer and step, so that a run that was stopped goes on where it was.
The weights with the lowest validation loss are the ones that are kept, in float16.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast, OPTConfig, OPTForCausalLM

from qsim_zoo.text import text

CONTEXT = 256
BATCH = 16
WARMUP = 100
PEAK_RATE = 1.5e-3
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def make_tokenizer(directory: Path) -> GPT2TokenizerFast:
    """A 2,048-token byte-level BPE fitted to the training split; OPT's special tokens at OPT's places."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text("train")],
        vocab_size=2048,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save(str(directory / "tokenizer.json"))
    tokenizer = GPT2TokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def make_model(seed: int) -> OPTForCausalLM:
    """OPT with 4 layers of width 256 (3.8 million parameters), as its paper initialises it."""
    config = OPTConfig(
        vocab_size=2048,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.1,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train_step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, step: int, seed: int) -> float:
    """One optimizer step on windows (and with dropout) drawn from `seed` and `step`; returns the loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())


@torch.no_grad()
def validation_loss(model: Any, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood per token over non-overlapping windows."""
    model.eval()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows.split(BATCH)]
    model.train()
    return float(sum(losses) / len(windows))


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))


def save(model: OPTForCausalLM, directory: Path) -> None:
    """Write config and float16 weights (the tied head once); the running model stays float32."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(directory, state_dict=weights)


@dataclass
class Training:
    """A run in progress, and the file that lets it go on after it was stopped."""

    model: OPTForCausalLM
    optimizer: torch.optim.Optimizer
    checkpoint: Path
    plan: dict[str, int]
    """Steps and seed: a checkpoint goes on only under the same."""
    step: int = 0
    best: float = math.inf

    def resume(self) -> None:
        """Take up the checkpoint, if there is one. Raises `click.ClickException` if it is of another plan."""
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


def train(directory: Path, work: Path, steps: int, seed: int, every: int) -> float:
    """Train (or go on training) opt-tiny into `directory`; returns the best validation loss."""
    tokenizer = make_tokenizer(directory)
    train_tokens, valid_tokens = (
        torch.tensor(tokenizer(text(split), verbose=False).input_ids) for split in ("train", "valid")
    )
    model = make_model(seed).train()
    run = Training(model, make_optimizer(model), work / "opt-tiny.pt", {"steps": steps, "seed": seed})
    run.resume()
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=steps, completed=run.step)
        while run.step < steps:
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step, steps)
            loss = train_step(model, run.optimizer, train_tokens, run.step, seed)
            run.step += 1
            progress.update(bar, advance=1, description=f"loss {loss:.3f}, best validation {run.best:.3f}")
            if run.step % every == 0 or run.step == steps:
                valid = validation_loss(model, valid_tokens)
                progress.console.print(f"step {run.step}: loss {loss:.3f}, validation {valid:.3f}")
                if valid < run.best:
                    run.best = valid
                    save(model, directory)
                run.keep()
    return run.best


@click.command()
@click.argument("name", type=click.Choice(["opt-tiny"]))
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).with_name("models"), show_default=True
)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("zoo-training"), help="Where checkpoints are kept."
)
@click.option("--steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=100, help="Steps between validations.", show_default=True)
def main(name: str, output: Path, work: Path, steps: int, seed: int, every: int) -> None:
    """Train a model of the zoo; a stopped run goes on from its last checkpoint."""
    best = train(output / name, work, steps, seed, every)
    click.echo(json.dumps({"model": name, "steps": steps, "seed": seed, "validation_perplexity": math.exp(best)}))


if __name__ == "__main__":
    main()
