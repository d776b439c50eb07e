"""How long `gptq` takes for one layer, against the algorithm written out column by column.

    python benchmarks/gptq.py [ROUNDS]

`straightforward` is what IST-DASLab/gptq does (`fasterquant`): blocks of 128 columns, three factorizations in float32,
and for each column one quantization and one outer product. What `gptq` is charged with is the time in its report:
everything after the Hessian is known, the errors it reports included. Two threads; each round measures both in turn, in
one process. The limit is 0.5 of the straightforward time, at an output error of no more than 1.001 times that one's.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor, nn

import qsim_core as qsim

SHAPES = [(768, 3072), (3072, 768)]
SCHEMES = {"channel(int4)": 0, "block(int4, 128)": 128}
TOKENS = 4096


def scale_of(weight: Tensor) -> Tensor:
    """absmax / 7 of each row, [N, 1]."""
    return weight.abs().amax(1, keepdim=True) / 7


def quantize(column: Tensor, scale: Tensor) -> Tensor:
    """A column [N, 1] on the grid of -7 … 7 times its scale."""
    return scale * torch.clamp(torch.round(column / scale), -7, 7)


def straightforward(weight: Tensor, hessian: Tensor, group: int, percdamp: float = 0.01, block: int = 128) -> Tensor:
    """GPTQ as its reference implementation has it; `group` columns share a scale, 0: a row does."""
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
    """A weight [N, K] and its inputs [T, K]: correlated, their columns of very different size."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(TOKENS, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = mixed * torch.randn(columns, generator=generator).exp() / columns**0.5
    return torch.randn(rows, columns, generator=generator) * 0.02, x


def main(rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    for rows, columns in SHAPES:
        weight, x = layer(rows, columns)
        hessian = x.T @ x
        for text, group in SCHEMES.items():
            slow, fast = [], []
            linear = nn.Linear(columns, rows, bias=False)
            for round_ in range(rounds + 1):
                start = time.perf_counter()
                expected = straightforward(weight, hessian, group)
                took = time.perf_counter() - start
                with torch.no_grad():
                    linear.weight.copy_(weight)
                simulation = qsim.simulate(linear, weights=text, transforms=["gptq"], calibration=[x])
                found = linear.weight.detach().clone()
                simulation.restore()
                if round_:  # the first one warms up
                    slow.append(took)
                    fast.append(simulation.reports[0].seconds)
            ratio = statistics.median(f / s for f, s in zip(fast, slow, strict=True))
            error, least = ((x @ (q - weight).T).norm() / (x @ weight.T).norm() for q in (found, expected))
            same = float(torch.isclose(found, expected, rtol=1e-5).float().mean())
            times = f"{statistics.median(fast):5.2f} s / {statistics.median(slow):5.2f} s = {ratio:.2f} (limit 0.5)"
            errors = f"error {error:.5f} / {least:.5f} = {error / least:.5f}"
            print(f"{rows:4} x {columns:4}  {text:16}  {times}  {errors}  {same:.3%} the same")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
