"""The loss over the steps of a training, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 640, 360, 48
TICKS = 5


def loss_curve(steps: Sequence[int], losses: Sequence[float], title: str) -> str:
    """An SVG image of losses by step, each as it was and their running mean; with one step it is a point."""
    low, high = _bounds(losses)
    across = (min(steps), max(max(steps), min(steps) + 1))

    def x(step: float) -> float:
        return MARGIN + (step - across[0]) / (across[1] - across[0]) * (WIDTH - 2 * MARGIN)

    def y(loss: float) -> float:
        return HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    def line(values: Sequence[float], colour: str, width: float) -> str:
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in range(TICKS + 1):
        loss, step = low + (high - low) * tick / TICKS, across[0] + (across[1] - across[0]) * tick / TICKS
        parts.append(f'<path d="M{MARGIN} {y(loss):.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step:.0f}</text>')
    parts += [line(losses, "#9bc", 1), line(_smooth(losses), "#036", 2)]
    parts.append(f'<text x="{WIDTH / 2}" y="{MARGIN / 2}" text-anchor="middle">{_escaped(title)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def _bounds(losses: Sequence[float]) -> tuple[float, float]:
    low, high = min(losses), max(losses)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and those before it, over a twentieth of the curve."""
    span = max(1, math.ceil(len(losses) / 20))
    return [sum(losses[max(0, i + 1 - span) : i + 1]) / min(span, i + 1) for i in range(len(losses))]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
