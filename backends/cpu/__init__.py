"""The CPU backend: a graph becomes a shared object in these stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcc.backends.cpu.build import build
from mcc.backends.cpu.densities import prefer_dense
from mcc.backends.cpu.emit import emit
from mcc.backends.cpu.fuse import fuse
from mcc.backends.cpu.hoist import hoist
from mcc.backends.cpu.integerize import integerize
from mcc.backends.cpu.layout import layout
from mcc.backends.cpu.lowering import Lowering
from mcc.backends.cpu.measure import measure
from mcc.backends.cpu.profile import KernelTime, Profiler
from mcc.backends.cpu.rephrase import rephrase
from mcc.backends.cpu.select import select
from mcc.backends.tune import Tuner, Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.graph import Graph
    from mcc.target import Target

STAGES = (rephrase, hoist, layout, integerize, fuse, select, emit, build)

__all__ = [
    "STAGES",
    "KernelTime",
    "Lowering",
    "Profiler",
    "TunedLayer",
    "lower",
    "prefer_dense",
    "profiler",
    "tune_layers",
]


def lower(graph: Graph, target: Target, tuning: Tuning) -> Lowering:
    """Run all stages.

    Args:
        graph: encoded.
        target: what for.
        tuning: whether tiles are timed on this machine or taken from the model of it.

    Raises:
        BackendError: an op or shape cannot be lowered.
    """
    return build(_emitted(graph, target, tuning))


def profiler(graph: Graph, target: Target, tuning: Tuning, inputs: Sequence[NDArray[Any]]) -> Profiler:
    """What times every kernel of an encoded graph on this machine.

    Raises:
        BackendError: an op or shape cannot be lowered.
    """
    return Profiler(_emitted(graph, target, tuning), inputs)


@dataclass(frozen=True)
class TunedLayer:
    """A layer with its timed tiles.

    Attributes:
        layer: the module.
        op: the op with its epilogue.
        kernel: the family.
        seconds: of one call, by tile; the tile that the model of the machine ranks first comes first.
    """

    layer: str
    op: str
    kernel: str
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest tile."""
        return min(self.seconds, key=lambda tile: self.seconds[tile])


def tune_layers(
    graph: Graph, target: Target, started: Callable[[int], None], done: Callable[[], None]
) -> list[TunedLayer]:
    """Time every tile of every layer that is not timed yet; compiling then takes the fastest.

    Times are remembered one by one: what is interrupted goes on where it was.

    Args:
        graph: encoded.
        target: that this machine can run.
        started: told the number of layers.
        done: told of each layer.

    Raises:
        BackendError: an op or shape cannot be lowered.
    """
    tuner = Tuner("measure", measure, candidates=None, chosen=done)
    lowering = Lowering(graph, target, tuner)
    for stage in STAGES[: STAGES.index(select)]:
        lowering = stage(lowering)
    started(len(lowering.regions))
    rows = []
    for choice in select(lowering).choices.values():
        if len(choice.kernel.tiles(choice.region, target)) > 1:
            times = tuner.times(choice.kernel, choice.region, target)
            rows.append(TunedLayer(choice.region.anchor.layer, choice.region.text, choice.kernel.name, times))
    return rows


def _emitted(graph: Graph, target: Target, tuning: Tuning) -> Lowering:
    """A graph through all stages but `build`."""
    lowering = Lowering(graph, target, Tuner(tuning, measure))
    for stage in STAGES[:-1]:
        lowering = stage(lowering)
    return lowering
