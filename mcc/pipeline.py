"""Runs passes in order; verifies, measures and reports after each."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcc.cost import graph_size
from mcc.errors import DataError, MccError, PassError
from mcc.report import PassRow
from mcc.rewrite import Context, Pass
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
        measure_latency: maps a graph to the median latency of its artifact in ms, for `measure="each"`; or None.
    """

    passes: tuple[Pass, ...]
    target: Target
    data: Data
    seed: int = 0
    verify: bool = True
    measure_latency: Callable[[Graph], float] | None = None

    def check(self) -> None:
        """Check that every pass has what it needs, before any work starts.

        Raises:
            DataError: naming the pass and the field of `mcc.Data` it lacks.
            PassError: a pass needs another one after it.
        """
        for position, step in enumerate(self.passes):
            for field in step.needs_data:
                if self.data.lacks(field):
                    raise DataError(
                        f"{step} needs data.{field}", remedy=f"give mcc.compile(…, data=mcc.Data({field}=…))"
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
        self.check()
        inputs = [tuple(example), sample_inputs(example, self.seed)]
        rows = [self._first_row(graph)]
        for position, step in enumerate(self.passes):
            label = f"pass {position + 1}/{len(self.passes)}: {step}"
            with _shown(progress, label):
                graph, row = self._step(step, graph, inputs, progress)
            rows.append(row)
        return graph, rows

    def _first_row(self, graph: Graph) -> PassRow:
        return PassRow("capture", 0, (), graph_size(graph), metric=self._metric(graph), latency_ms=self._latency(graph))

    def _step(
        self, step: Pass, before: Graph, inputs: list[tuple[Any, ...]], progress: Progress | None
    ) -> tuple[Graph, PassRow]:
        started = time.perf_counter()
        context = Context(self.target, self.data, self.seed, progress)
        try:
            after = step.run(before.copy(), context).clean().repropagate()
        except MccError:
            raise
        except Exception as error:
            raise PassError(
                f"{step} failed: {type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}",
                remedy="this is a defect of the pass: its cause stands above in the traceback",
            ) from error
        largest = verify_pass(step, before, after, inputs) if self.verify else None
        return after, PassRow(
            str(step), context.edits, tuple(context.declined), graph_size(after), largest, self._metric(after),
            self._latency(after), time.perf_counter() - started, tuple(context.notes),
        )  # fmt: skip

    def _metric(self, graph: Graph) -> float | None:
        return None if self.data.evaluate is None else float(self.data.evaluate(graph))

    def _latency(self, graph: Graph) -> float | None:
        return None if self.measure_latency is None else self.measure_latency(graph)


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
