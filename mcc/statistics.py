"""Activation statistics over calibration data: what observers see, and the ranges they choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from mcc.errors import DataError, MccError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mcc.data import Batch
    from mcc.graph import Graph

Observer = Literal["min-max", "percentile-99.9", "percentile-99.99", "percentile-99.999", "mse"]
OBSERVERS: tuple[Observer, ...] = ("min-max", "percentile-99.9", "percentile-99.99", "percentile-99.999", "mse")
BINS = 2048
MSE_CANDIDATES = 80


class Histogram:
    """A histogram whose range grows by doubling, so that one pass over the data is enough.

    Counts are exact; values are known to one bin in `BINS`.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self._edge = 0.0  # bins span [-edge, edge]

    def add(self, values: Tensor) -> None:
        """Count `values`, float, any shape."""
        flat = values.detach().float().flatten()
        if flat.numel() == 0:
            return
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
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
        """The shrunken min-max range with the least squared quantization error for `levels` codes."""
        best, best_error = (self.low, self.high), float("inf")
        centers = self.centers()
        for i in range(MSE_CANDIDATES):
            shrink = 1 - i / (MSE_CANDIDATES * 1.25)
            low, high = self.low * shrink, self.high * shrink
            scale, zero_point = affine_parameters(low, high, 0, levels - 1)
            codes = (torch.round(centers / scale) + zero_point).clamp(0, levels - 1)
            error = float((((codes - zero_point) * scale - centers) ** 2 * self.counts).sum())
            if error < best_error:
                best, best_error = (low, high), error
        return best

    def choose_range(self, observer: Observer, levels: int) -> tuple[float, float]:
        """The range `observer` chooses; it always holds zero."""
        if observer == "min-max":
            return self.low, self.high
        if observer == "mse":
            return self.mse_range(levels)
        return self.quantile_range(float(observer.removeprefix("percentile-")) / 100)


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


def observe(graph: Graph, names: Iterable[str], batches: Iterable[Batch | Tensor]) -> dict[str, Histogram]:
    """Run `graph` over calibration batches and histogram the values of the named nodes.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    histograms = {name: Histogram() for name in names}
    _record(graph, histograms, batches, lambda name, values: histograms[name].add(values))
    return histograms


def channel_peaks(graph: Graph, names: Iterable[str], batches: Iterable[Batch | Tensor]) -> dict[str, Tensor]:
    """The largest absolute value that each channel of the named nodes, their last dim, has over calibration batches.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    peaks = {name: torch.zeros(()) for name in names}

    def take(name: str, values: Tensor) -> None:
        if values.numel():
            peaks[name] = torch.maximum(peaks[name], values.detach().abs().reshape(-1, values.shape[-1]).amax(0))

    _record(graph, peaks, batches, take)
    return peaks


@dataclass(frozen=True)
class ChannelMoments:
    """How large the channels of a value are, and how they go together, over calibration data.

    Attributes:
        sizes: mean of |x|, float64 [channels].
        products: mean of x x^T, float64 [channels, channels].
    """

    sizes: Tensor
    products: Tensor


def channel_moments(graph: Graph, names: Iterable[str], batches: Iterable[Batch | Tensor]) -> dict[str, ChannelMoments]:
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

    _record(graph, sums, batches, take)
    return {
        name: ChannelMoments(total.sizes / max(counts[name], 1), total.products / max(counts[name], 1))
        for name, total in sums.items()
    }


def _record(
    graph: Graph, names: Iterable[str], batches: Iterable[Batch | Tensor], take: Callable[[str, Tensor], None]
) -> None:
    recorder = _Recorder(graph.module, names, take)
    count = 0
    with torch.no_grad():
        for batch in batches:
            try:
                recorder.run(*_inputs(batch))
            except (RuntimeError, TypeError) as error:
                raise _misfit(count, batch, error) from error
            count += 1
    if count == 0:
        raise _empty()


class StepwiseRuns:
    """A graph that runs over all calibration batches at once, node by node; values live until their last reader.

    Args:
        graph: as it is now.
        batches: kept in memory together.

    Raises:
        DataError: there is no batch.
    """

    def __init__(self, graph: Graph, batches: Iterable[Batch | Tensor]) -> None:
        self.batches = list(batches)
        if not self.batches:
            raise _empty()
        self._runs = [fx.Interpreter(graph.module) for _ in self.batches]
        for run, batch in zip(self._runs, self.batches, strict=True):
            run.args_iter = iter(_inputs(batch))
        self._nodes = iter(graph.module.graph.nodes)

    def arguments(self, node: fx.Node) -> list[list[Any]]:
        """What the next node is called with, for each batch."""
        return [[run.map_nodes_to_values(a, node) for a in node.args] for run in self._runs]

    def step(self, node: fx.Node, changed: Iterable[fx.Node] = ()) -> None:
        """Run the next node, and before it those of `changed`, whose tensors are no longer what they were.

        Raises:
            DataError: a batch does not fit the graph's inputs.
        """
        for i, run in enumerate(self._runs):
            extra = [n for n in changed if n not in run.env]
            for ancestor in changed:
                run.env[ancestor] = run.run_node(ancestor)
            try:
                run.env[node] = run.run_node(node)
            except (RuntimeError, TypeError, StopIteration) as error:
                raise _misfit(i, self.batches[i], error) from error
            for last in {*run.user_to_last_uses.get(node, []), *extra}:
                del run.env[last]

    def run_to(self, name: str) -> list[Tensor]:
        """Run up to the node called `name`; returns its value for each batch."""
        for node in self._nodes:
            self.step(node)
            if node.name == name:
                return [run.env[node] for run in self._runs]
        raise MccError(f"the graph has no further node %{name}", remedy="ask for nodes in their order")


def run_in_step(
    graph: Graph, batches: Iterable[Batch | Tensor], before: Callable[[fx.Node, list[list[Any]]], bool]
) -> None:
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
    stored = _made_of_stored(graph)
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            changed = node.op == "call_function" and before(node, runs.arguments(node))
            runs.step(node, _stored_ancestors(node, stored) if changed else ())


def _made_of_stored(graph: Graph) -> set[fx.Node]:
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


def _inputs(batch: Batch | Tensor) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _empty() -> DataError:
    return DataError(
        "the calibration data is empty",
        remedy="give at least one batch; a list lasts for all passes, a generator for one",
    )


def _misfit(count: int, batch: Batch | Tensor, error: Exception) -> DataError:
    shapes = ", ".join(str(list(t.shape)) for t in _inputs(batch) if isinstance(t, Tensor))
    what = (str(error) or "an input lacks").splitlines()[0]
    return DataError(
        f"calibration batch {count} with inputs {shapes} does not fit the graph: {what}",
        remedy="give each batch as a tuple of the model's inputs",
    )
