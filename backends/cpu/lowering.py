"""The state that the stages of the CPU backend hand on, each filling its part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import fx

    from mcc.artifact import TensorSpec
    from mcc.backends.cpu.memory_plan import MemoryPlan
    from mcc.backends.kernel import Kernel, Lowered, Region
    from mcc.backends.tune import Tuner
    from mcc.graph import Graph
    from mcc.report import LayerRow
    from mcc.slabs import Derived
    from mcc.target import Target


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a region, made for it.

    Attributes:
        region: what it runs; its weight may have been decoded.
        kernel: the family.
        tile: the register tile.
        lowered: function and packed weights.
        reason: why the region does not run as it is stored, or empty.
    """

    region: Region
    kernel: Kernel
    tile: str
    lowered: Lowered
    reason: str = ""


@dataclass(frozen=True)
class Lowering:
    """A graph on its way to a shared object.

    Attributes:
        graph: encoded.
        target: what for.
        tuner: chooses between tiles.
        regions: by the node whose value each gives; filled by integerize, extended by fuse.
        refused: why a layer with weights became no region.
        choices: by the node whose value each gives; filled by select.
        module: the relax module; filled by emit.
        weights: arrays the library takes, in order; filled by emit.
        derived: how those are made that a file does not hold; filled by emit.
        inputs, outputs: filled by emit.
        layers: rows of the report; filled by emit.
        library: the shared object; filled by build.
        memory: of activations; filled by build.
        sorts: whether it calls TVM's sort; filled by emit.
    """

    graph: Graph
    target: Target
    tuner: Tuner
    regions: Mapping[fx.Node, Region] = field(default_factory=dict)
    refused: Mapping[fx.Node, str] = field(default_factory=dict)
    choices: Mapping[fx.Node, Choice] = field(default_factory=dict)
    module: Any = None
    weights: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    derived: tuple[Derived, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    library: bytes = b""
    memory: MemoryPlan | None = None
    sorts: bool = False
