"""Time the decoding of single tokens with a cache, against the float32 model's.

    python benchmarks/decoding.py [--shape 125m|1.3b] [--layers N] [--tokens N] [--rounds N] [--thread] [FORMAT …]

The model is OPT blocks with random weights (`forward.py`), which are overwritten (`keep=False`). In each round each
model in turn decodes TOKENS tokens after a prompt of 128, in one process. Medians are printed, as ratios to the float32
model's. With --thread torch runs on one thread, and the processor's time is measured.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from forward import FORMATS, SHAPES, model_of
from qsim_fast.kernels import native
from timing import machine, seconds, thread_seconds
from torch import Tensor, nn

import qsim_core as qsim

PROMPT = 128


def decode(model: nn.Module, ids: Tensor, tokens: int) -> None:
    """Take the most likely token, so many times."""
    model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--thread", action="store_true", help="one thread, and the processor's time")
    given = parser.parse_args()
    measure = thread_seconds if given.thread else seconds
    torch.set_num_threads(1 if given.thread else torch.get_num_threads())
    wrong = [name for name in given.formats if name not in FORMATS]
    if wrong:
        parser.error(f"no format {wrong[0]!r}; there are {', '.join(FORMATS)}")

    base = model_of(given.shape, given.layers)
    ids = torch.randint(0, 512, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    models: dict[str, nn.Module] = {"float32": base}
    with native.only(True):
        for name in given.formats or FORMATS:
            models[name] = copy.deepcopy(base)
            recipe = qsim.Recipe(**FORMATS[name], skip=("lm_head",))  # type: ignore[arg-type]
            qsim.simulate(models[name], recipe, example={"input_ids": ids}, keep=False)
            decode(models[name], ids, 2)
        times = {
            name: [measure(lambda model=model: decode(model, ids, given.tokens)) for _ in range(1)]  # type: ignore[misc]
            for name, model in models.items()
        }
        for _ in range(given.rounds):
            for name, model in models.items():
                times[name].append(measure(lambda model=model: decode(model, ids, given.tokens)))  # type: ignore[misc]

    print(f"{machine('cpu')}; {given.layers} blocks of OPT-{given.shape}, {given.tokens} tokens after {PROMPT}")
    plain = statistics.median(times["float32"][1:])
    for name, taken in times.items():
        print(
            f"{name:10} {statistics.median(taken[1:]) / plain:.2f}   {min(taken) / given.tokens * 1e3:.2f} ms a token"
        )


if __name__ == "__main__":
    main()
