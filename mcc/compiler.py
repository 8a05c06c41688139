"""`mcc.compile`: the only place where passes meet backends."""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcc import onnx_import
from mcc.artifact import Contents, Manifest, Workspace, pack_tree, stored_bytes, without_derived
from mcc.backends import cpu
from mcc.computed_weights import store_computed_weights
from mcc.cost import graph_size
from mcc.data import Data
from mcc.encode import encode
from mcc.errors import ArtifactError, CaptureError, SpecError, TargetError
from mcc.fixed_shapes import fix_shapes
from mcc.frontend import capture, split_constants, with_constants
from mcc.graph import Graph
from mcc.passes import PASSES, EliminateIdentity, FoldBatchNorm
from mcc.pipeline import Pipeline
from mcc.report import Declined, PassRow, Report
from mcc.rewrite import Context, Pass
from mcc.runtime import Artifact
from mcc.spec import parse_passes, read_recipe
from mcc.spellings import unify_spellings
from mcc.target import Target, missing_features, parse_target
from mcc.tvm_runtime import use_threads
from mcc.verify import sample_inputs, verify_artifact, verify_capture, verify_encoding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from onnx import ModelProto
    from rich.progress import Progress

    from mcc.backends.cpu import Lowering, Profiler, TunedLayer
    from mcc.backends.tune import Tuning

    Model = torch.nn.Module | torch.export.ExportedProgram | Graph | str | Path | ModelProto
    Passes = str | Path | Sequence[Pass | str]

Measure = Literal["ends", "each", "never"]
LATENCY_RUNS = 30
LATENCY_SECONDS = 0.2


@dataclass(frozen=True)
class Options:
    """What `compile` does beside the model and its passes.

    Attributes:
        target: a target, or its text.
        data: for passes that need it.
        verify: whether guarantees and the artifact are checked.
        measure: whether latency is measured of the first and last state, of each, or of none.
        tuning: "measure" times tiles on this machine and remembers; "model" takes the tile ranked first.
        threads: that kernels use; None for all cores.
        seed: of every random choice.
    """

    target: Target | str = "cpu"
    data: Data = field(default_factory=Data)
    verify: bool = True
    measure: Measure = "ends"
    tuning: Tuning = "measure"
    threads: int | None = None
    seed: int = 0

    @property
    def resolved_target(self) -> Target:
        """The target itself.

        Raises:
            TargetError: there is no such target.
        """
        return parse_target(self.target) if isinstance(self.target, str) else self.target


@dataclass(frozen=True)
class Compressed:
    """A compressed model, not compiled yet: to be compiled for several targets, or for shapes fixed afterwards.

    Attributes:
        graph: what the passes made.
        example: inputs that it takes, flattened: not those of the model where a pass changed what the graph takes.
        passes: their text, every option written.
        report: a row for each pass.
    """

    graph: Graph
    example: tuple[Any, ...]
    passes: str
    report: Report

    def fixed(self, *example: Any) -> Compressed:
        """The same for inputs of exactly the example's shapes, as of a model of any batch one for a single image.

        Kernels that need to know how many rows there are take layers of it that they did not take before.

        Raises:
            CaptureError: the example is not what the graph takes.
        """
        inputs = pytree.tree_leaves(pytree.tree_map(_as_tensor, example))
        return replace(self, graph=fix_shapes(self.graph, inputs), example=tuple(inputs))


class Deferred:
    """A compiled model that is captured and compiled at its first call, for that call's shapes."""

    def __init__(self, compile_now: Callable[[tuple[Any, ...], dict[str, Any]], Artifact]) -> None:
        self._compile = compile_now
        self._constants: dict[str, Any] = {}
        self.artifact: Artifact | None = None

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the model.

        Raises:
            ArtifactError: an input that is no tensor is another one than in the first call.
        """
        tensors, constants = split_constants(named)
        if self.artifact is None:
            self.artifact, self._constants = self._compile(args, named), constants
        if constants != self._constants:
            raise ArtifactError(
                f"the model was compiled for {self._constants}, and is called with {constants}",
                remedy="compile it again for those",
            )
        return self.artifact(*args, **tensors)


def compile(  # noqa: A001, PLR0913 (the public name; its options are those of design and docs)
    model: Model | Compressed,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    passes: Passes = (),
    keyword_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: object = None,
    target: Target | str = "cpu",
    data: Data | None = None,
    verify: bool = True,
    measure: Measure = "ends",
    tuning: Tuning = "measure",
    threads: int | None = None,
    seed: int = 0,
) -> Any:
    """Compress and compile a model.

    Args:
        model: nn.Module, ExportedProgram, mcc.Graph, what `compress` gave, or ONNX model (path or ModelProto).
        example_inputs: positional inputs; left out, the model is captured at its first call.
        passes: passes, their text, a path of a YAML recipe, or a list of passes and texts.
        keyword_inputs: example inputs given by name; numbers, texts and None among them are fixed, and no inputs.
        dynamic_shapes: as torch.export takes them; a string may stand for a named dim.
        target: "cpu" is this machine; see `mcc targets`.
        data: for passes that calibrate, train or evaluate.
        verify: check every pass and the artifact.
        measure: "ends" measures latency first and last, "each" after every pass, "never" not at all.
        tuning: "measure" times tiles on this machine and remembers their times; "model" takes the one ranked first.
        threads: kernels use; None for all cores.
        seed: of every random choice.

    Returns:
        an Artifact; a Deferred where neither example inputs nor a model that has its own were given.

    Raises:
        MccError: what is wrong, naming the pass and the node.
    """
    options = Options(target, data or Data(), verify, measure, tuning, threads, seed)
    steps = resolve_passes(passes)
    Pipeline(steps, options.resolved_target, options.data).check()

    if isinstance(model, Compressed):
        if steps or example_inputs or keyword_inputs or dynamic_shapes:
            raise SpecError(
                "a compressed model has its passes and its inputs",
                remedy="give passes to mcc.compress, and fix shapes by compressed.fixed(…)",
            )
        with progress_display() as progress:
            return _finished(model, options, progress)

    def compile_for(args: tuple[Any, ...], named: dict[str, Any]) -> Artifact:
        graph, flat = _captured(model, args, named, dynamic_shapes, verify=verify)
        return compile_graph(graph, flat, steps, options)

    if example_inputs is None and keyword_inputs is None and isinstance(model, torch.nn.Module):
        return Deferred(compile_for)
    return compile_for(tuple(example_inputs or ()), dict(keyword_inputs or {}))


def compress(  # noqa: PLR0913 (as of `compile`)
    model: Model,
    example_inputs: tuple[Any, ...] = (),
    *,
    passes: Passes,
    keyword_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: object = None,
    target: Target | str = "cpu",
    data: Data | None = None,
    verify: bool = True,
    seed: int = 0,
) -> Compressed:
    """Compress a model without compiling it, once for several artifacts.

    Args:
        model: as `compile` takes it; one that does not say what it takes needs example inputs.
        example_inputs: positional inputs.
        passes: as of `compile`.
        keyword_inputs: as of `compile`.
        dynamic_shapes: as of `compile`.
        target: that passes choose formats for; the model may be compiled for others.
        data: as of `compile`.
        verify: check every pass.
        seed: of every random choice.

    Returns:
        what `compile` takes in place of a model.

    Raises:
        MccError: what is wrong, naming the pass and the node.
    """
    steps, given = resolve_passes(passes), data or Data()
    pipeline = Pipeline(steps, Options(target).resolved_target, given, seed, verify)
    pipeline.check()
    if isinstance(model, torch.nn.Module) and not (example_inputs or keyword_inputs):
        raise CaptureError("a module is captured with example inputs", remedy="give mcc.compress(model, (x,), …)")
    graph, flat = _captured(model, example_inputs, dict(keyword_inputs or {}), dynamic_shapes, verify=verify)
    with progress_display() as progress:
        compressed, rows, taken = pipeline.run_with_inputs(graph, flat, progress)
    return Compressed(compressed, taken, _passes_text(steps), Report(tuple(rows), ()))


def _passes_text(steps: tuple[Pass, ...]) -> str:
    return "; ".join(step.full_text() for step in steps)


def _captured(
    model: Model, args: tuple[Any, ...], named: Mapping[str, Any], dynamic_shapes: object, *, verify: bool
) -> tuple[Graph, tuple[Any, ...]]:
    """The graph, and its inputs."""
    inputs, given = pytree.tree_map(_as_tensor, (args, named))
    keywords, constants = split_constants(given)
    with with_constants(model, constants):
        graph = load_graph(model, inputs, keywords, dynamic_shapes, verify=verify)
    return graph, tuple(pytree.tree_leaves((inputs, keywords))) or example_of(graph)


def _as_tensor(value: Any) -> Any:
    is_array = hasattr(value, "__array__") and not isinstance(value, Tensor)
    return torch.from_numpy(value) if is_array else value


def load_graph(
    model: Model,
    example_inputs: tuple[Any, ...],
    keyword_inputs: Mapping[str, Any],
    dynamic_shapes: object,
    *,
    verify: bool = True,
) -> Graph:
    """Capture any kind of model, and check a module's graph against the module; computed weights become stored ones.

    Raises:
        CaptureError: the model is of no known kind, or cannot be captured.
        VerificationError: the graph computes something else than the module.
    """
    if isinstance(model, Graph):
        return _unified(model.copy().eval())
    if not isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        module, inputs, dims = onnx_import.import_onnx(model)
        graph = capture(module, example_inputs or inputs, dynamic_shapes=dynamic_shapes or dims)
        graph.rename_inputs(module.input_names)
        return _unified(graph)
    graph = _unified(capture(model, example_inputs, keyword_inputs=keyword_inputs, dynamic_shapes=dynamic_shapes))
    if verify and isinstance(model, torch.nn.Module):
        verify_capture(model, graph, example_inputs, keyword_inputs)
    return graph


def _unified(graph: Graph) -> Graph:
    """A graph, edited: computed weights are stored ones, and what is spelled out is the op that has its name."""
    return unify_spellings(store_computed_weights(graph))


def example_of(graph: Graph) -> tuple[Tensor, ...]:
    """Inputs of the captured shapes: normal floats, zero integers."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for node in graph.inputs:
        if not isinstance(node.value, Tensor):
            raise CaptureError(f"input {node.name} is not a tensor", remedy="make it a constant of the module")
        shape = [s if isinstance(s, int) else int(s.node.hint) for s in node.shape]
        if node.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator, dtype=node.dtype))
        else:
            made.append(torch.zeros(shape, dtype=node.dtype))
    return tuple(made)


def known_passes() -> dict[str, type[Pass]]:
    """Every pass class by name: the built-in ones, and those that packages offer as `mcc.passes` entry points."""
    known = {kind.pass_name(): kind for kind in PASSES}
    for point in entry_points(group="mcc.passes"):
        kind = point.load()
        known[kind.pass_name()] = kind
    return known


def resolve_passes(passes: Passes) -> tuple[Pass, ...]:
    """Pass objects from objects, text, or a recipe file.

    Raises:
        SpecError: a text is malformed or names an unknown pass or option.
    """
    if isinstance(passes, Path) or (isinstance(passes, str) and passes.endswith((".yaml", ".yml"))):
        return read_recipe(Path(passes), known_passes())
    if isinstance(passes, str):
        return parse_passes(passes, known_passes())
    steps: list[Pass] = []
    for step in passes:
        if isinstance(step, str):
            steps += parse_passes(step, known_passes())
        elif isinstance(step, Pass):
            steps.append(step)
        else:
            raise SpecError(
                f"{step!r} is not a pass", remedy="give pass objects, such as FoldBatchNorm(), or their text"
            )
    return tuple(steps)


def compile_graph(graph: Graph, example: tuple[Any, ...], steps: tuple[Pass, ...], options: Options) -> Artifact:
    """Run passes over a captured graph, encode, lower and verify."""
    target = options.resolved_target
    runnable = not missing_features(target)
    with progress_display() as progress:

        def latency(state: Graph, inputs: tuple[Any, ...]) -> float:
            return median_latency(_lower(state, options)[0], inputs)

        pipeline = Pipeline(
            steps, target, options.data, options.seed, options.verify, latency if runnable else None,
            measure_each=options.measure == "each",
        )  # fmt: skip
        compressed, rows, taken = pipeline.run_with_inputs(graph, example, progress)
        if options.measure == "ends" and runnable and steps:
            rows[0] = replace(rows[0], latency_ms=latency(graph, example))
        return _finished(Compressed(compressed, taken, _passes_text(steps), Report(tuple(rows), ())), options, progress)


def _finished(compressed: Compressed, options: Options, progress: Progress) -> Artifact:
    """Encode, lower, verify and time what the passes made."""
    task = progress.add_task("compiling", total=None)
    runnable = not missing_features(options.resolved_target)
    artifact, encoded, last = _lower(compressed.graph, options)
    if options.verify and runnable:
        inputs = [compressed.example, sample_inputs(compressed.example, options.seed)]
        started = time.perf_counter()
        verify_encoding(compressed.graph, encoded, inputs)
        error = verify_artifact(encoded, artifact, inputs)
        seconds = last.seconds + time.perf_counter() - started
        last = replace(last, largest_error=error, seconds=seconds)
    if options.measure != "never" and runnable:
        last = replace(last, latency_ms=median_latency(artifact, compressed.example))
    progress.remove_task(task)
    report = Report((*compressed.report.passes, last), artifact.report.layers)
    return artifact.with_manifest(passes=compressed.passes, report=json.loads(report.as_json()))


def layer_profiler(graph: Graph, example: tuple[Tensor, ...], steps: tuple[Pass, ...], options: Options) -> Profiler:
    """Run passes over a graph; returns what times every kernel of what comes out, one after another."""
    pipeline = Pipeline(steps, options.resolved_target, options.data, options.seed, options.verify)
    compressed, _, taken = pipeline.run_with_inputs(graph, example)
    encoded, _ = _encoded(compressed, options)
    arrays = [x.detach().numpy() for x in taken]
    return cpu.profiler(encoded, options.resolved_target, options.tuning, arrays)


def tune_layers(
    graph: Graph, example: tuple[Tensor, ...], steps: tuple[Pass, ...], options: Options
) -> list[TunedLayer]:
    """Run passes over a graph and time every tile of its layers on this machine, with a progress display.

    Raises:
        TargetError: this machine cannot run the target.
    """
    target = options.resolved_target
    if missing := missing_features(target):
        raise TargetError(
            f"this machine cannot time kernels for {target}: it lacks {', '.join(missing)}",
            remedy="tune on a machine that `mcc targets` says can run it",
        )
    with progress_display() as progress:
        pipeline = Pipeline(steps, target, options.data, options.seed, options.verify)
        compressed, _ = pipeline.run(graph, example, progress)
        encoded, _ = _encoded(compressed, options)
        use_threads(1)
        task = progress.add_task("timing tiles", total=None)
        return cpu.tune_layers(
            encoded, target, lambda total: progress.update(task, total=total), lambda: progress.advance(task)
        )


def _encoded(graph: Graph, options: Options) -> tuple[Graph, list[Declined]]:
    """A graph with batch norms folded where that is exact, without calls of no effect, in its stored formats."""
    context = Context(options.resolved_target, options.data, options.seed)
    folded = FoldBatchNorm().run(EliminateIdentity().run(graph.copy().eval(), context), context)
    verdict = partial(cpu.prefer_dense, target=options.resolved_target, tuning=options.tuning)
    return encode(folded.clean().repropagate(), verdict)


def _lower(graph: Graph, options: Options) -> tuple[Artifact, Graph, PassRow]:
    """Encode and lower one state of a graph; returns the artifact, the encoded graph, and their row of the report."""
    started = time.perf_counter()
    target = options.resolved_target
    encoded, dense = _encoded(graph, options)
    lowering = cpu.lower(encoded, target, options.tuning)
    notes = tuple(f"{row.layer} ({row.op}): {row.reason}" for row in lowering.layers if row.reason)
    if (memory := lowering.memory) is not None and memory.alive:
        notes += (f"activations between kernels: {memory.planned:,} bytes; {memory.alive:,} are in use at once",)
    stored = without_derived(lowering.weights, lowering.derived)
    size = replace(graph_size(encoded), stored_bytes=sum(map(stored_bytes, stored.values())))
    row = PassRow(
        "encode and lower", len(lowering.choices), tuple(dense), size,
        seconds=time.perf_counter() - started, notes=notes,
    )  # fmt: skip
    report = Report((), lowering.layers)
    contents = Contents(_manifest(encoded, lowering, report), lowering.weights, lowering.library)
    if missing_features(target):
        return Artifact.for_other_machine(contents), encoded, row
    return Artifact(contents, options.threads), encoded, row


def _manifest(graph: Graph, lowering: Lowering, report: Report) -> Manifest:
    target = lowering.target
    signature = graph.signature
    tiles = {c.region.anchor.name: f"{c.kernel.name} {c.tile}" for c in lowering.choices.values()}
    return Manifest(
        inputs=lowering.inputs, outputs=lowering.outputs, output_tree=pack_tree(signature.output_tree),
        target=str(target), features=target.features, passes="", weights=tuple(lowering.weights),
        report=report.as_dict(), tiles=tiles, sorts=lowering.sorts,
        workspace=lowering.memory.workspace if lowering.memory else Workspace(), derived=lowering.derived,
    )  # fmt: skip


def median_latency(artifact: Callable[..., Any], example: tuple[Any, ...]) -> float:
    """Median time of a call in ms, of the series of calls that other work on the machine disturbed least.

    A call of microseconds is timed in many series: one would lie within a turn that the scheduler gives to another
    process.
    """
    artifact(*example)
    medians: list[float] = []
    until = time.perf_counter() + LATENCY_SECONDS
    while not medians or time.perf_counter() < until:
        times = []
        for _ in range(LATENCY_RUNS):
            started = time.perf_counter()
            artifact(*example)
            times.append(time.perf_counter() - started)
        medians.append(statistics.median(times))
    return min(medians) * 1e3


@contextmanager
def progress_display() -> Iterator[Progress]:
    """A progress display on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield progress
