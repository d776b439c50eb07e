"""Time `gptq` on one layer, against the algorithm written out column by column.

    python benchmarks/gptq.py [ROUNDS]

`straightforward` is the algorithm of IST-DASLab/gptq (`fasterquant`): blocks of 128 columns, three factorizations in
float32, and for each column one quantization and one outer product. `gptq` makes one factorization, in float64, and
carries errors on without rewriting the later columns. With `report` its time includes everything that it does to a
layer after the Hessian is known: also rounding to nearest, and three output errors.

There are two threads. Each round measures all in turn, in one process; medians are printed. The limit is half the
straightforward time, at 1.001 of its output error or less.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from qsim_fast.kernels import native
from qsim_gptq.factors import factorize
from qsim_gptq.feedback import feed_back
from qsim_gptq.grids import grids
from torch import Tensor, nn

import qsim_core as qsim

SHAPES = [(768, 3072), (3072, 768)]
SCHEMES = {"channel(int4)": 0, "block(int4, 128)": 128}
TOKENS = 4096


def scale_of(weight: Tensor) -> Tensor:
    """The scale of each row, absmax / 7: [N, 1]."""
    return weight.abs().amax(1, keepdim=True) / 7


def quantize(column: Tensor, scale: Tensor) -> Tensor:
    """Round a column [N, 1] to the grid of -7 … 7 times its scale."""
    return scale * torch.clamp(torch.round(column / scale), -7, 7)


def straightforward(weight: Tensor, hessian: Tensor, group: int, percdamp: float = 0.01, block: int = 128) -> Tensor:
    """GPTQ as in its reference implementation. `group` columns share a scale; with 0 a row shares one."""
    w, h, columns = weight.clone(), hessian.clone(), weight.shape[1]
    scale = scale_of(w)
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    index = torch.arange(columns)
    h[index, index] += percdamp * torch.mean(torch.diag(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    quantized = torch.zeros_like(w)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        now, within = w[:, first:last].clone(), inverse[first:last, first:last]
        rounded, errors = torch.zeros_like(now), torch.zeros_like(now)
        for i in range(last - first):
            column, diagonal = now[:, i], within[i, i]
            if group and (first + i) % group == 0:
                scale = scale_of(w[:, first + i : first + i + group])
            q = quantize(column.unsqueeze(1), scale).flatten()
            rounded[:, i] = q
            error = (column - q) / diagonal
            now[:, i:] -= error.unsqueeze(1).matmul(within[i, i:].unsqueeze(0))
            errors[:, i] = error
        quantized[:, first:last] = rounded
        w[:, last:] -= errors.matmul(inverse[first:last, last:])
    return quantized


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Make a weight [N, K] and its inputs [T, K]. The inputs are correlated, and their columns differ much in size."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(TOKENS, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = mixed * torch.randn(columns, generator=generator).exp() / columns**0.5
    return torch.randn(rows, columns, generator=generator) * 0.02, x


@torch.no_grad()
def measured(weight: Tensor, x: Tensor, text: str, group: int, rounds: int) -> str:
    """Measure one layer, and give a line of times, their ratios, and errors."""
    hessian, quantizer = x.T @ x, qsim.parse(text)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    times: list[list[float]] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        expected = straightforward(weight, hessian, group)
        middle = time.perf_counter()
        (grid,) = grids(quantizer, weight, 1, True, "")
        found = feed_back(weight, factorize(hessian, 0.01, act_order=False), grid, 128)
        end = time.perf_counter()
        linear.weight.copy_(weight)
        with qsim.simulate(linear, weights=text, transforms=["gptq"], calibration=[x]) as simulation:
            times.append([middle - start, end - middle, simulation.reports[0].seconds])
    slow, fast, reported = (statistics.median(column) for column in zip(*times[1:], strict=True))  # the first warms up
    error, least = (float((x @ (q - weight).T).norm() / (x @ weight.T).norm()) for q in (found, expected))
    same = float(torch.isclose(found, expected, rtol=1e-5).float().mean())
    return (
        f"straightforward {slow:5.2f} s  gptq {fast:5.2f} s = {fast / slow:.2f}  with report {reported:5.2f} s ="
        f" {reported / slow:.2f}  error {error:.5f} / {least:.5f} = {error / least:.5f}  {same:.3%} the same"
    )


def main(rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    with native.only(True):
        for rows, columns in SHAPES:
            weight, x = layer(rows, columns)
            for text, group in SCHEMES.items():
                print(f"{rows:4} x {columns:4}  {text:16}  {measured(weight, x, text, group, rounds)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
