"""Calls of a block beside the same calls of the block as it was, each on its own inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.blocks import Block
from qsim_core.transforms.forward import Copies, as_in_evaluation, unshared

PairWatcher = Callable[[Site, Call, Call | None], None]
"""Called with a site, a call, and the same call in the block as it was; None: there was no call with as many inputs."""


def observe_beside(block: Block, watch: PairWatcher) -> None:
    """Show `watch` every matmul by a weight, beside the same call of the original block on its own inputs."""
    assert block.original is not None
    with as_in_evaluation(block.module):
        for sample in range(len(block.inputs)):
            pairs = _Pairs(watch)
            if sample < len(block.original.inputs):
                block.original.show(pairs.note, sample)
            block.show(pairs, sample)


class _Pairs:
    """Pairs the calls of a block with those of the original block, for one batch."""

    def __init__(self, watch: PairWatcher) -> None:
        self.watch = watch
        self.calls: dict[str, list[Call]] = {}
        self.copies: Copies = {}

    def note(self, site: Site, call: Call) -> None:
        """Keep a call of the original block. Its inputs are copied, as the block may change them in place."""
        if site.weight is not None:
            kept = [x if place == call.weight else unshared(x, self.copies) for place, x in enumerate(call.operands)]
            self.calls.setdefault(site.name, []).append(replace(call, operands=tuple(kept)))

    def __call__(self, site: Site, call: Call) -> None:
        if site.weight is not None:
            left = self.calls.get(site.name)
            before = left.pop(0) if left else None
            self.watch(site, call, before if before is not None and _shapes(before) == _shapes(call) else None)


def _shapes(call: Call) -> list[Any]:
    return [operand.shape for operand in call.operands]
