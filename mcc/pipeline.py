"""Runs passes in order; verifies, measures and reports after each."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcc.cost import graph_size
from mcc.errors import DataError, MccError, PassError
from mcc.report import PassRow
from mcc.rewrite import Context, Exact, Pass
from mcc.verify import sample_inputs, verify_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress

    from mcc.data import Data
    from mcc.graph import Graph
    from mcc.target import Target


@dataclass(frozen=True)
class Pipeline:
    """A list of passes and what they run with.

    Attributes:
        passes: in order.
        target: what the graph is compiled for.
        data: the user's data.
        seed: of every random choice.
        verify: whether each pass's guarantee is checked.
        measure_latency: maps a graph and inputs to the median latency of its artifact in ms, or None.
        measure_each: whether the latency is measured after each pass.
    """

    passes: tuple[Pass, ...]
    target: Target
    data: Data
    seed: int = 0
    verify: bool = True
    measure_latency: Callable[[Graph, tuple[Any, ...]], float] | None = None
    measure_each: bool = False

    def check(self) -> None:
        """Check that every pass has what it needs, before any work starts.

        Raises:
            DataError: naming the pass and the field of `mcc.Data` it lacks.
            PassError: a pass needs another one after it, or data after one that changes what the graph takes.
        """
        changed: Pass | None = None
        for position, step in enumerate(self.passes):
            if step.needs_data and changed is not None:
                raise PassError(
                    f"{step} needs data of the model's inputs, and {changed} changes those",
                    remedy=f"put {step.pass_name()} before {changed.pass_name()}",
                )
            changed = step if step.changes_signature else changed
            for field in step.needs_data:
                if self.data.lacks(field):
                    raise DataError(
                        f"{step} needs data.{field}", remedy=f"give mcc.compile(…, data=mcc.Data({field}=…))"
                    )
            for other in self.passes[position + 1 :] if step.ends_changes else ():
                if not isinstance(other.guarantee, Exact):
                    raise PassError(
                        f"{other} comes behind {step}, and would change what that leaves",
                        remedy=f"put {other.pass_name()} before {step.pass_name()}, which comes once",
                    )
            later = {p.pass_name() for p in self.passes[position + 1 :]}
            if step.needs_after and not later.intersection(step.needs_after):
                raise PassError(
                    f"{step} needs one of {', '.join(step.needs_after)} after it", remedy="add it to the pass list"
                )

    def run(
        self, graph: Graph, example: Sequence[Any], progress: Progress | None = None
    ) -> tuple[Graph, list[PassRow]]:
        """Run all passes on a copy of `graph`.

        Args:
            graph: the captured model; left as it was.
            example: its inputs, for verification.
            progress: where to show what is under way.

        Raises:
            VerificationError: a pass broke its guarantee.
        """
        compressed, rows, _ = self.run_with_inputs(graph, example, progress)
        return compressed, rows

    def run_with_inputs(
        self, graph: Graph, example: Sequence[Any], progress: Progress | None = None
    ) -> tuple[Graph, list[PassRow], tuple[Any, ...]]:
        """As `run`; the example comes back too, as the compressed graph takes it."""
        self.check()
        inputs = [tuple(example), sample_inputs(example, self.seed)]
        rows = [self._first_row(graph, inputs[0])]
        captured = exact = graph
        for position, step in enumerate(self.passes):
            label = f"pass {position + 1}/{len(self.passes)}: {step}"
            before = graph
            with _shown(progress, label):
                graph, inputs, row = self._step(position, (captured, exact, graph), inputs, progress)
            if before is exact and isinstance(step.guarantee, Exact):
                exact = graph
            rows.append(row)
        return graph, rows, inputs[0]

    def _first_row(self, graph: Graph, example: tuple[Any, ...]) -> PassRow:
        latency = self._latency(graph, example)
        return PassRow("capture", 0, (), graph_size(graph), metric=self._metric(graph), latency_ms=latency)

    def _step(
        self,
        position: int,
        graphs: tuple[Graph, Graph, Graph],
        inputs: list[tuple[Any, ...]],
        progress: Progress | None,
    ) -> tuple[Graph, list[tuple[Any, ...]], PassRow]:
        step, (captured, exact, before) = self.passes[position], graphs
        measured = not any(s.changes_signature for s in self.passes[: position + 1])
        started = time.perf_counter()
        measure = self.measure_latency
        latency = None if measure is None else lambda graph: measure(graph, inputs[0])
        context = Context(self.target, self.data, self.seed, progress, latency, captured, exact)
        try:
            after = step.run(before.copy(), context).clean().repropagate()
        except MccError:
            raise
        except Exception as error:
            raise PassError(
                f"{step} failed: {type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}",
                remedy="this is a defect of the pass: its cause stands above in the traceback",
            ) from error
        converted = [step.convert_inputs(before, after, sample) for sample in inputs]
        largest = verify_pass(step, before, after, converted) if self.verify else None
        if not measured and self.data.evaluate is not None:
            context.note("the metric is not measured: what the graph takes is no longer what the model takes")
        metric = self._metric(after) if measured else None
        return after, converted, PassRow(
            str(step), context.edits, tuple(context.declined), graph_size(after), largest, metric,
            self._latency(after, converted[0]), time.perf_counter() - started, tuple(context.notes),
        )  # fmt: skip

    def _metric(self, graph: Graph) -> float | None:
        return None if self.data.evaluate is None else self.data.measure(graph)

    def _latency(self, graph: Graph, example: tuple[Any, ...]) -> float | None:
        if self.measure_latency is None or not self.measure_each:
            return None
        return self.measure_latency(graph, example)


@contextmanager
def _shown(progress: Progress | None, label: str) -> Iterator[None]:
    if progress is None:
        yield
        return
    task = progress.add_task(label, total=None)
    try:
        yield
    finally:
        progress.remove_task(task)
