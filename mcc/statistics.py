"""Activation statistics over calibration data: what observers see, and the ranges they choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.data import in_order
from mcc.errors import DataError, MccError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mcc.data import Inputs
    from mcc.graph import Graph, Node

Observer = Literal[
    "min-max", "moving-average", "percentile-99.9", "percentile-99.99", "percentile-99.999", "mse", "entropy"
]  # fmt: skip
OBSERVERS: tuple[Observer, ...] = get_args(Observer)
BINS = 2048
# of a range, or of one end of it
SHRINKS = (*(1 - i / 100 for i in range(80)), 0.17, 0.14, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
MOMENTUM = 0.9  # of the ranges of batches before


class Histogram:
    """A histogram whose range grows by doubling, so that one pass over the data is enough.

    Counts are exact; values are known to one bin in `BINS`.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self._average: tuple[float, float] | None = None  # of the ranges of batches
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self._edge = 0.0  # bins span [-edge, edge]

    def add(self, values: Tensor) -> None:
        """Count `values`, float, any shape."""
        flat = values.detach().float().flatten()
        if flat.numel() == 0:
            return
        low, high = min(float(flat.min()), 0.0), max(float(flat.max()), 0.0)
        self.low, self.high = min(self.low, low), max(self.high, high)
        before = (low, high) if self._average is None else self._average
        ends = zip(before, (low, high), strict=True)
        self._average = tuple(MOMENTUM * b + (1 - MOMENTUM) * end for b, end in ends)  # type: ignore[assignment]  # two
        largest = max(-self.low, self.high)
        if self._edge == 0.0:
            self._edge = largest
        while self._edge < largest:
            self._widen()
        if self._edge > 0.0:
            self.counts += torch.histc(flat, BINS, -self._edge, self._edge).double()

    def _widen(self) -> None:
        merged = self.counts.reshape(BINS // 2, 2).sum(dim=1)
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
        self._edge *= 2

    def centers(self) -> Tensor:
        """The middle of every bin, [BINS]."""
        step = 2 * self._edge / BINS
        return torch.arange(BINS, dtype=torch.float64) * step - self._edge + step / 2

    def quantile_range(self, fraction: float) -> tuple[float, float]:
        """The narrowest range, zero included, that leaves (1 - fraction) / 2 of the values out at each end."""
        if self._edge == 0.0:
            return 0.0, 0.0
        share = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - fraction) / 2
        centers, half = self.centers(), self._edge / BINS
        low = centers[int((share <= tail).sum())] - half
        high = centers[min(int((share < 1 - tail).sum()), BINS - 1)] + half
        return min(max(float(low), self.low), 0.0), max(min(float(high), self.high), 0.0)

    def mse_range(self, levels: int) -> tuple[float, float]:
        """The range with the least squared quantization error for `levels` codes.

        Of the min-max range shrunken; then each end is shrunken by itself.
        """
        centers = self.centers()

        def error(low: float, high: float) -> float:
            scale, zero_point = affine_parameters(low, high, 0, levels - 1)
            codes = (torch.round(centers / scale) + zero_point).clamp(0, levels - 1)
            return float((((codes - zero_point) * scale - centers) ** 2 * self.counts).sum())

        low, high = _least(error, [(self.low * s, self.high * s) for s in SHRINKS])
        low, high = _least(error, [(low, high), *((low, self.high * s) for s in SHRINKS)])
        return _least(error, [(low, high), *((self.low * s, high) for s in SHRINKS)])

    def entropy_range(self, levels: int) -> tuple[float, float]:
        """The shrunken min-max range whose codes keep the most of the distribution of the values.

        That is the least Kullback-Leibler divergence of the distribution, what lies outside counted at the ends, to the
        one that each code's share spread evenly over its values gives. Migacz: 8-bit inference with TensorRT. GPU
        Technology Conference, 2017.
        """
        if self._edge == 0.0:
            return 0.0, 0.0
        centers, present = self.centers(), self.counts > 0

        def divergence(low: float, high: float) -> float:
            scale, zero_point = affine_parameters(low, high, 0, levels - 1)
            codes = (torch.round(centers / scale) + zero_point).clamp(0, levels - 1).long()
            inside = (centers >= low - scale / 2) & (centers <= high + scale / 2)
            # outliers count in the distribution, not in what codes keep of it
            kept = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, self.counts * inside)
            shared = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, (present & inside).double())
            found = torch.where(present & inside, kept[codes] / shared[codes].clamp(min=1), 0.0)
            wanted = self.counts * inside
            ends = inside.nonzero().flatten()[[0, -1]]
            wanted[ends[0]] += self.counts[: ends[0]].sum()
            wanted[ends[1]] += self.counts[ends[1] + 1 :].sum()
            p, q = wanted / wanted.sum(), found / found.sum().clamp(min=1e-30)
            return float(torch.where(p > 0, p * torch.log(p / q.clamp(min=1e-12)), 0.0).sum())

        return _least(divergence, [(self.low * s, self.high * s) for s in SHRINKS])

    def choose_range(self, observer: Observer, levels: int) -> tuple[float, float]:
        """The range `observer` chooses; it always holds zero."""
        if observer == "min-max":
            return self.low, self.high
        if observer == "moving-average":
            return (self.low, self.high) if self._average is None else self._average
        if observer == "mse":
            return self.mse_range(levels)
        if observer == "entropy":
            return self.entropy_range(levels)
        return self.quantile_range(float(observer.removeprefix("percentile-")) / 100)


def _least(cost: Callable[[float, float], float], ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """The first of the ranges that cost least."""
    return min(ranges, key=lambda ends: cost(*ends))


def affine_parameters(low: float, high: float, low_code: int, high_code: int) -> tuple[float, int]:
    """Scale and zero point that map [low, high], zero included, onto the codes; zero is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (high_code - low_code)
    if scale < torch.finfo(torch.float32).tiny:
        return 1.0, low_code if low == 0.0 else high_code
    return scale, min(max(low_code + round(-low / scale), low_code), high_code)


class _Recorder(fx.Interpreter):
    """Runs a graph and hands the values of chosen nodes on, with their names."""

    def __init__(self, module: fx.GraphModule, names: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        super().__init__(module)
        self._names = frozenset(names)
        self._take = take

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.name in self._names and isinstance(result, Tensor):
            if not result.isfinite().all():
                raise DataError(
                    f"calibration: %{n.name} is infinite or not a number", remedy="check the batch and the weights"
                )
            self._take(n.name, result)
        return result


def observe(graph: Graph, names: Iterable[str], batches: Iterable[Inputs]) -> dict[str, Histogram]:
    """Run `graph` over calibration batches and histogram the values of the named nodes.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    histograms = {name: Histogram() for name in names}
    record(graph, histograms, batches, lambda name, values: histograms[name].add(values))
    return histograms


def channel_peaks(graph: Graph, names: Iterable[str], batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """The largest absolute value that each channel of the named nodes, their last dim, has over calibration batches.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    peaks = {name: torch.zeros(()) for name in names}

    def take(name: str, values: Tensor) -> None:
        if values.numel():
            peaks[name] = torch.maximum(peaks[name], values.detach().abs().reshape(-1, values.shape[-1]).amax(0))

    record(graph, peaks, batches, take)
    return peaks


def channel_energies(
    graph: Graph, wanted: Iterable[tuple[str, int]], batches: Iterable[Inputs]
) -> dict[tuple[str, int], Tensor]:
    """The mean square of each channel of nodes over calibration batches, float64 [channels].

    Args:
        graph: that runs.
        wanted: names of nodes, each with the dim that holds its channels.
        batches: calibration data.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    sums = {key: torch.zeros((), dtype=torch.float64) for key in wanted}
    counts = dict.fromkeys(sums, 0)

    def take(name: str, values: Tensor) -> None:
        for key in (k for k in sums if k[0] == name):
            rows = values.detach().double().movedim(key[1], -1).flatten(0, -2)
            sums[key] = sums[key] + rows.square().sum(0)
            counts[key] += len(rows)

    record(graph, {name for name, _ in sums}, batches, take)
    return {key: total / max(counts[key], 1) for key, total in sums.items()}


def channels_read(node: Node) -> tuple[str, int]:
    """The value that a layer reads, and the dim of its channels, as `channel_energies` takes them."""
    source, weight = node.operand(0), node.weight_operand
    assert source is not None
    assert weight is not None
    return source.name, -1 if node.op is ops.LINEAR else len(source.shape) - len(weight.shape) + 1


@dataclass(frozen=True)
class ChannelMoments:
    """How large the channels of a value are, and how they go together, over calibration data.

    Attributes:
        sizes: mean of |x|, float64 [channels].
        products: mean of x x^T, float64 [channels, channels].
    """

    sizes: Tensor
    products: Tensor


def channel_moments(graph: Graph, names: Iterable[str], batches: Iterable[Inputs]) -> dict[str, ChannelMoments]:
    """Moments of the channels, their last dim, of the named nodes.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    zero = ChannelMoments(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    sums, counts = dict.fromkeys(names, zero), dict.fromkeys(names, 0)

    def take(name: str, values: Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1]).double()
        old = sums[name]
        sums[name] = ChannelMoments(old.sizes + rows.abs().sum(0), old.products + rows.T @ rows)
        counts[name] += len(rows)

    record(graph, sums, batches, take)
    return {
        name: ChannelMoments(total.sizes / max(counts[name], 1), total.products / max(counts[name], 1))
        for name, total in sums.items()
    }


def record(graph: Graph, names: Iterable[str], batches: Iterable[Inputs], take: Callable[[str, Tensor], None]) -> None:
    """Run `graph` over calibration batches and hand the values of the named nodes on, as they come.

    Raises:
        DataError: there is no batch, a batch does not fit the graph's inputs, or a value is not finite.
    """
    recorder = _Recorder(graph.module, names, take)
    count = 0
    with torch.no_grad():
        for batch in batches:
            try:
                recorder.run(*in_order(batch, graph.signature.inputs))
            except (RuntimeError, TypeError) as error:
                raise _misfit(count, batch, error) from error
            count += 1
    if count == 0:
        raise _empty()


class StepwiseRuns:
    """A graph that runs over all calibration batches at once, node by node; values live until their last reader.

    Attributes:
        stored: the nodes whose values depend on stored tensors alone.

    Args:
        graph: as it is now.
        batches: kept in memory together.

    Raises:
        DataError: there is no batch.
    """

    def __init__(self, graph: Graph, batches: Iterable[Inputs]) -> None:
        self.batches = list(batches)
        if not self.batches:
            raise _empty()
        self._runs = [fx.Interpreter(graph.module) for _ in self.batches]
        for run, batch in zip(self._runs, self.batches, strict=True):
            run.args_iter = iter(in_order(batch, graph.signature.inputs))
        self._nodes = list(graph.module.graph.nodes)
        self.stored = made_of_stored(graph)
        self._done = 0

    def arguments(self, node: fx.Node) -> list[list[Any]]:
        """What the next node is called with, for each batch."""
        return [[run.map_nodes_to_values(a, node) for a in node.args] for run in self._runs]

    def step(self, node: fx.Node, changed: Iterable[fx.Node] = ()) -> None:
        """Run the next node, and before it those of `changed`, whose tensors are no longer what they were.

        Raises:
            DataError: a batch does not fit the graph's inputs.
        """
        extra = self._compute(changed)
        if node in self.stored:
            self._compute([node])
        for i, run in enumerate(self._runs):
            try:
                if node not in self.stored:
                    run.env[node] = run.run_node(node)
            except (RuntimeError, TypeError, StopIteration) as error:
                raise _misfit(i, self.batches[i], error) from error
            for last in {*run.user_to_last_uses.get(node, []), *extra}:
                del run.env[last]

    def _compute(self, stored: Iterable[fx.Node]) -> list[fx.Node]:
        """Run what depends on stored tensors alone, once for all batches; returns those that had no value."""
        wanted = list(stored)
        new = [node for node in wanted if node not in self._runs[0].env]
        for node in wanted:
            value = self._runs[0].run_node(node)
            for run in self._runs:
                run.env[node] = value
        return new

    def run_to(self, name: str) -> list[Tensor]:
        """Run up to the node called `name`; returns its value for each batch."""
        place = next((i for i in range(self._done, len(self._nodes)) if self._nodes[i].name == name), None)
        if place is None:
            raise MccError(f"the graph has no further node %{name}", remedy="ask for nodes in their order")
        self._advance(place + 1)
        return [run.env[self._nodes[place]] for run in self._runs]

    def run_before(self, node: fx.Node) -> None:
        """Run up to what comes before a node."""
        self._advance(self._nodes.index(node))

    def _advance(self, count: int) -> None:
        for node in self._nodes[self._done : count]:
            self.step(node)
        self._done = max(count, self._done)

    def values(self, nodes: Iterable[fx.Node]) -> list[dict[fx.Node, Any]]:
        """What nodes have given, for each batch; each of them has readers to come."""
        wanted = tuple(nodes)
        return [{node: run.env[node] for node in wanted} for run in self._runs]

    def refresh(self, nodes: Iterable[fx.Node]) -> None:
        """Run those of some nodes again that have run, all that is stored: the tensors they read have changed."""
        wanted = set(nodes)
        extra = self._compute(node for node in self._nodes[: self._done] if node in wanted)
        for run in self._runs:
            for node in extra:
                del run.env[node]


def run_in_step(graph: Graph, batches: Iterable[Inputs], before: Callable[[fx.Node, list[list[Any]]], bool]) -> None:
    """Run `graph` over all calibration batches at once, node by node.

    What `before` changes in the graph's tensors counts from that node on: layers behind a compressed one see what it
    gives.

    Args:
        graph: as it is now.
        batches: kept in memory together.
        before: told of each node that is called, with its arguments for each batch; returns whether it changed a
            tensor that the node reads.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    runs = StepwiseRuns(graph, batches)
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            changed = node.op == "call_function" and before(node, runs.arguments(node))
            runs.step(node, _stored_ancestors(node, runs.stored) if changed else ())


def made_of_stored(graph: Graph) -> set[fx.Node]:
    """The nodes whose values depend on stored tensors alone."""
    found: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _stored_ancestors(node: fx.Node, stored: set[fx.Node]) -> list[fx.Node]:
    """Of `stored` those that a node reads, directly or not, each behind what it reads itself."""
    found: dict[fx.Node, None] = {}
    for read in node.all_input_nodes:
        if read in stored:
            found |= dict.fromkeys([*_stored_ancestors(read, stored), read])
    return list(found)


def _empty() -> DataError:
    return DataError(
        "the calibration data is empty",
        remedy="give at least one batch; a list lasts for all passes, a generator for one",
    )


def _misfit(count: int, batch: Inputs, error: Exception) -> DataError:
    shapes = ", ".join(str(list(t.shape)) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    what = (str(error) or "an input lacks").splitlines()[0]
    return DataError(
        f"calibration batch {count} with inputs {shapes} does not fit the graph: {what}",
        remedy="give each batch as a tuple of the model's inputs, or as a dict of them by name",
    )
