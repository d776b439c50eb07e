"""Count the scales that round to zero or to subnormal numbers: `python benchmarks/scales.py MODEL SCALE`.

SCALE is the scale format of ABFP, like `e4m3` or `scaled(uint4, channel)`. Weights are INT4 and activations INT8, in
vectors of 16, as in docs/studies/scales.yaml. Shares are of the scales of vectors that are not zero.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from qsim_core import Bench, Format, Quantizer, Recipe, parse, simulate
from qsim_core.evaluation.job import Job
from qsim_core.sites.site import Site


def smallest_normal(scale: str) -> float:
    """The smallest normal number of a floating-point format of scales; 0 for any other."""
    found = parse(scale)
    mantissa = getattr(found, "mantissa", None)
    if not isinstance(found, Format) or mantissa is None:
        return 0.0
    table = found.table()
    return float(table[table > 0].min()) * 2.0 ** int(mantissa)


def main() -> None:
    """Print a line for each role and kind of site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("scale")
    options = parser.parse_args()
    quantizers = {"weights": f"abfp(int4, n=16, scale={options.scale})"}
    quantizers["activations"] = f"abfp(int8, n=16, scale={options.scale})"
    bench = Bench(options.model)
    job = Job.at(bench.located, Recipe.of({"model": options.model, **quantizers}, bench.host), bench.host)
    loaded, least = bench.load(), smallest_normal(options.scale)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def count(site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        scales = None if quantizer is None else quantizer.scales(before)
        if scales is None:
            return
        vectors = torch.nn.functional.pad(before, (0, -before.shape[-1] % 16)).unflatten(-1, (-1, 16))
        alive = (vectors != 0).any(-1).reshape(-1)
        found = scales.scale.reshape(-1)[alive]
        for place, many in enumerate((len(found), int((found == 0).sum()), int((found.abs() < least).sum()))):
            counts[site.named(role), site.name.rsplit(".", 1)[-1]][place] += many

    example = job.evaluator.example(loaded, job.data(None))
    with simulate(loaded.model, job.recipe, example=example) as simulation:
        simulation.audit(observer=count)
    print(f"{options.model}, scales {options.scale}")
    for (role, kind), (total, zero, small) in sorted(counts.items()):
        print(f"{role:14}{kind:12}{total:9} scales, zero {zero / max(total, 1):6.1%}, subnormal {small / total:6.1%}")


if __name__ == "__main__":
    main()
