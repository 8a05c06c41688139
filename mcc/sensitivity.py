"""How much each layer suffers from each format, measured; and formats for all layers within a drop that is allowed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.progress import Progress

    Formats = Mapping[str, str]  # by layer; layers that are not in it stay in float
    Measure = Callable[[Formats], float]


@dataclass(frozen=True)
class Damage:
    """What one layer in one format does.

    Attributes:
        layer: its name.
        format: that its weight is in; all others are in float.
        drop: of the metric; less than zero where it rises.
        saved: bytes.
    """

    layer: str
    format: str
    drop: float
    saved: int


def damages(
    measure: Measure, base: float, saved: Mapping[str, Mapping[str, int]], progress: Progress | None = None
) -> list[Damage]:
    """Measure every layer in every format by itself, the largest drop first.

    Args:
        measure: the metric, higher is better, with layers in these formats.
        base: the metric in float.
        saved: by layer, its formats with the bytes that each saves.
        progress: where to show what is under way.
    """
    with _step(progress, "sensitivity", sum(map(len, saved.values()))) as advance:
        found = []
        for layer, sizes in saved.items():
            for kind, size in sizes.items():
                found.append(Damage(layer, kind, base - measure({layer: kind}), size))
                advance()
    return sorted(found, key=lambda d: -d.drop)


def choose(measure: Measure, least: float, found: Sequence[Damage], progress: Progress | None = None) -> dict[str, str]:
    """Formats that save much within a drop of the metric.

    Layers go on to smaller formats step by step, the step with the least drop a saved byte first; of that order the
    longest beginning is taken whose measured drop is allowed, found by bisection. Wang, Liu, Lin, Lin, Han: HAQ:
    hardware-aware automated quantization with mixed precision. CVPR 2019 (there by reinforcement learning).

    Args:
        measure: as in `damages`.
        least: that the metric may be with all layers in their formats.
        found: what `damages` gave.
        progress: where to show what is under way.

    Returns:
        a format for each layer that gets one.
    """
    steps = _order(found)
    taken, beyond = 0, len(steps) + 1
    with _step(progress, "mixed precision", max(beyond, 1).bit_length()) as advance:
        while beyond - taken > 1:
            middle = (taken + beyond) // 2
            if measure(dict(steps[:middle])) >= least:
                taken = middle
            else:
                beyond = middle
            advance()
    return dict(steps[:taken])


def _order(found: Sequence[Damage]) -> list[tuple[str, str]]:
    """Layers and the formats they go on to, in the order in which that is done."""
    left: dict[str, list[Damage]] = {}
    for damage in sorted(found, key=lambda d: d.saved):
        left.setdefault(damage.layer, []).append(damage)
    reached = dict.fromkeys(left, (0.0, 0))
    order = []
    while any(left.values()):
        layer, count = min(
            ((layer, n) for layer, rest in left.items() for n in range(1, len(rest) + 1)),
            key=lambda step: _price(reached[step[0]], left[step[0]][step[1] - 1]),
        )
        damage = left[layer][count - 1]
        left[layer] = left[layer][count:]
        reached[layer] = max(damage.drop, 0.0), damage.saved
        order.append((layer, damage.format))
    return order


def _price(reached: tuple[float, int], to: Damage) -> float:
    """The further drop for a byte saved."""
    further = to.saved - reached[1]
    return (max(to.drop, 0.0) - reached[0]) / further if further > 0 else float("inf")


@contextmanager
def _step(progress: Progress | None, label: str, total: int) -> Iterator[Callable[[], None]]:
    if progress is None:
        yield lambda: None
        return
    task = progress.add_task(label, total=total)
    try:
        yield lambda: progress.advance(task)
    finally:
        progress.remove_task(task)
