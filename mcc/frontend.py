"""Capture: a torch module or an exported program becomes a Graph of whole ATen ops that still trains.

torch.export in eval mode, not strict, without decompositions (they would freeze batch norm and dropout), then: inline
wrapper calls, drop asserts and casts that change nothing, make in-place ops functional, drop copies, one node a
tensor, one spelling for reshapes, names from module paths, and look every op up in the table.
"""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from mcc import normalize, ops
from mcc.errors import CaptureError, UnsupportedOpError
from mcc.foreign_masks import recognize_masks
from mcc.foreign_quantizers import is_foreign, recognize_quantizers
from mcc.graph import Graph, deep_copy, module_path, source_line
from mcc.recurrent import spelled_out

LARGEST_DIM = 1 << 20
SIZES_TRIED = 64


def capture(
    model: torch.nn.Module | ExportedProgram | fx.GraphModule,
    example_inputs: tuple[Any, ...] = (),
    *,
    keyword_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: object = None,
) -> Graph:
    """Capture a model into a graph; the model itself is left as it was.

    Args:
        model: a module, a GraphModule, or an ExportedProgram (which has its example inputs with it).
        example_inputs: positional inputs, as tensors or nested tuples, lists and dicts of them.
        keyword_inputs: inputs given by name; numbers, texts and None among them are fixed, and no inputs of the graph.
        dynamic_shapes: as torch.export takes them; a plain string may stand for a Dim of that name, from 1 up.

    Raises:
        CaptureError: torch.export refuses the model, or an asked-for dim came out fixed.
        UnsupportedOpError: the model uses ops outside the op table.
    """
    if isinstance(model, ExportedProgram):
        # a program exported in training mode would keep its flags: the graph's own eval() resets them
        return _from_program(model, {})
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}",
            remedy="give an nn.Module, a torch.export.ExportedProgram, an mcc.Graph or an ONNX model",
        )
    kwargs, constants = split_constants(keyword_inputs or {})
    if constants:
        with with_constants(model, constants):
            return capture(model, example_inputs, keyword_inputs=kwargs, dynamic_shapes=dynamic_shapes)
    _refuse_untrackable(model)
    shapes = _named_dims(dynamic_shapes, {}, {})
    asked = _asked_dims(model, example_inputs, kwargs, shapes)
    args, kwargs = _widened(example_inputs, kwargs, asked)
    with (
        in_eval_mode(model),
        spelled_out(),
    ):  # train mode would record stochastic depth, auxiliary heads and batch counters
        program = _export(model, args, kwargs, dynamic_shapes)
    _check_asserts(program, asked, type(model).__name__)
    return _from_program(program, asked)


def split_constants(keyword_inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs given by name, and what among them is no input but a choice, such as use_cache=False."""
    fixed = {k: v for k, v in keyword_inputs.items() if v is None or isinstance(v, bool | int | float | str)}
    return {k: v for k, v in keyword_inputs.items() if k not in fixed}, fixed


@contextmanager
def with_constants(model: object, constants: Mapping[str, Any]) -> Iterator[None]:
    """While this lasts a module is called with these, too."""
    if not constants or not isinstance(model, torch.nn.Module):
        yield
        return
    own = vars(model).get("forward")
    model.forward = partial(model.forward, **constants)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each of its modules back in its own."""
    modes = {module: module.training for module in model.modules()}
    with suppress(NotImplementedError):  # exported modules have no modes
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


_SUGGESTED_BOUND = re.compile(r"^\s*(\w+) = Dim\('\w+',(?: min=(\d+),?)?(?: max=(\d+))?\)$", re.MULTILINE)


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: object
) -> ExportedProgram:
    """Export; a dim given by name alone takes the bounds that the model puts on it, such as its longest sequence.

    Conditions on dims that torch cannot prove are left in the program where nothing else helps.
    """
    bounds: dict[str, tuple[int, int]] = {}
    deferred = False
    while True:
        shapes = _named_dims(dynamic_shapes, {}, bounds)
        try:
            # under no_grad some modules take a fused inference path; recurrent ones look up their weights anew, which
            # torch warns of
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
                return torch.export.export(
                    model, args, kwargs, dynamic_shapes=shapes, strict=False,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )  # fmt: skip
        except CaptureError:
            raise
        except Exception as error:
            lines = (str(error).strip() or repr(error)).splitlines()
            violated = lines[0].startswith("Constraints violated")
            suggested = {} if bounds else _suggested_bounds(str(error))
            if suggested:
                bounds = suggested
            elif violated and not deferred:
                deferred = True
            else:
                # of dims that do not fit, the second line says why
                raise CaptureError(
                    f"torch.export could not capture {type(model).__name__}: {' '.join(lines[: 2 if violated else 1])}",
                    remedy="make `torch.export.export(model, example_inputs, strict=False)` work first",
                ) from error


def _suggested_bounds(message: str) -> dict[str, tuple[int, int]]:
    found = _SUGGESTED_BOUND.findall(message)
    return {name: (int(low or 1), int(high or LARGEST_DIM)) for name, low, high in found}


def _check_asserts(program: ExportedProgram, asked: Mapping[tuple[int, int], str], name: str) -> None:
    """Try what torch could not prove of the dynamic dims at sizes in their ranges, and refuse it where it fails.

    Args:
        program: exported.
        asked: names of its dynamic dims, by input and axis.
        name: of the model.

    Raises:
        CaptureError: naming the condition and sizes that break it.
    """
    conditions = {
        node.args[0].meta["val"].node.expr
        for node in program.graph.nodes
        if node.target is torch.ops.aten._assert_scalar.default
        and isinstance(node.args[0], fx.Node)
        and isinstance(node.args[0].meta["val"], torch.SymBool)
    }
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values.get(str(name)) for name in program.graph_signature.user_inputs]
    sizes_of: dict[str, Any] = {
        d: x.shape[axis] for (i, axis), d in asked.items() if isinstance(x := inputs[i], Tensor)
    }
    dims = {size.node.expr: sympy.Symbol(dim) for dim, size in sizes_of.items() if isinstance(size, torch.SymInt)}
    generator = random.Random(0)
    for condition in sorted(conditions, key=str):
        symbols = sorted(condition.free_symbols, key=str)
        ranges = [program.range_constraints.get(symbol) for symbol in symbols]
        if None in ranges or any(symbol_is_type(s, SymT.UNBACKED_INT) for s in symbols):
            continue  # about a value that is known when the graph runs
        marks = {int(n) + i for n in condition.atoms(sympy.Integer) for i in (-1, 0, 1)}
        tried = [
            _sizes(int(r.lower), int(min(r.upper, LARGEST_DIM)), marks, generator) for r in ranges if r is not None
        ]
        for sizes in zip(*tried, strict=True):
            if not _holds(condition, dict(zip(symbols, sizes, strict=True))):
                broken = ", ".join(f"{dims.get(s, s)} = {size}" for s, size in zip(symbols, sizes, strict=True))
                raise CaptureError(
                    f"torch.export could not capture {name}: it needs {condition.subs(dims)}, which {broken} breaks",
                    remedy="narrow the ranges of the dynamic dims, or leave one of them out",
                )


def _holds(condition: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> bool:
    try:
        return bool(condition.subs(sizes))
    except ZeroDivisionError:
        return False


def _sizes(low: int, high: int, marks: set[int], generator: random.Random) -> list[int]:
    """Sizes of a dim to try a condition at: the ends, its own numbers, and some of each magnitude."""
    spread = [low + int((high - low) ** generator.random()) for _ in range(SIZES_TRIED)]
    return [low, high, *(min(max(m, low), high) for m in sorted(marks)), *spread]


def _from_program(program: ExportedProgram, asked: Mapping[tuple[int, int], str]) -> Graph:
    # export shares parameter storage with the user's model; passes edit tensors, so the graph gets its own
    module = deep_copy(normalize.plain_module(program.module(check_guards=False)))
    normalize.normalize(module)
    graph = Graph(module)
    for (position, axis), dim in asked.items():
        size = graph.inputs[position].shape[axis]
        if isinstance(size, int):
            raise CaptureError(
                f"dim {axis} of input {graph.inputs[position].fx.target} was asked to be dynamic ({dim}) but the model "
                f"fixes it at {size}",
                remedy=f"leave {dim} out of dynamic_shapes, or rewrite what depends on the size",
            )
        graph.dims[str(size.node.expr)] = dim
    _rename(graph)
    recognize_quantizers(graph)
    refuse_unknown(graph)
    _refuse_values(graph)
    recognize_masks(graph)
    return graph.eval()


def _refuse_values(graph: Graph) -> None:
    """Refuse outputs that are no tensors, and tensors of element types that NumPy and the kernels lack."""
    for place, leaf in enumerate(pytree.tree_leaves(graph.module.graph.output_node().args[0])):
        if not isinstance(leaf, fx.Node) or not isinstance(leaf.meta.get("val"), Tensor):
            what = "a size" if isinstance(leaf, fx.Node) else repr(leaf)
            raise CaptureError(
                f"output {place} of the model is {what}, not a tensor", remedy="wrap the model to return tensors alone"
            )
    for name, tensor in (*graph.module.named_parameters(), *graph.module.named_buffers()):
        if tensor.dtype is torch.bfloat16 or tensor.is_complex():
            raise CaptureError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which no kernel computes in",
                remedy="convert the model first: model.float()",
            )


def _refuse_untrackable(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        kind = type(parameter)
        if kind.__module__.partition(".")[0] == "torchao":
            raise CaptureError(
                f"{name} is a {kind.__name__} of torchao, which exports as that package's own ops",
                remedy="quantize with its PT2E flow, or give mcc the float model and the pass quantize",
            )
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            raise CaptureError(
                f"{path or type(module).__name__}: BatchNorm(momentum=None) averages over a counter that a graph lacks",
                remedy="set its momentum to a number, such as 0.1",
            )


def _named_dims(shapes: object, dims: dict[str, Any], bounds: Mapping[str, tuple[int, int]]) -> Any:
    """`shapes` with each string replaced by one Dim of that name, within its bounds where it has any."""
    if isinstance(shapes, str):
        low, high = bounds.get(shapes, (1, LARGEST_DIM))
        return dims.setdefault(shapes, Dim(shapes, min=low, max=high))
    if isinstance(shapes, Mapping):
        return {key: _named_dims(value, dims, bounds) for key, value in shapes.items()}
    if isinstance(shapes, list | tuple):
        return type(shapes)(_named_dims(value, dims, bounds) for value in shapes)
    return shapes


def _leaf_specs(value: Any, spec: Any) -> list[Any]:
    """The dynamic dims of every tensor in a nested input, in order."""
    if isinstance(value, Mapping):
        return [s for k, v in value.items() for s in _leaf_specs(v, spec.get(k) if isinstance(spec, Mapping) else None)]
    if isinstance(value, list | tuple):
        specs = spec if isinstance(spec, list | tuple) else [None] * len(value)
        return [s for v, one in zip(value, specs, strict=False) for s in _leaf_specs(v, one)]
    return [spec]


def _asked_dims(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: object
) -> dict[tuple[int, int], str]:
    """Names of the dims that are to be dynamic, by position of the flattened input and axis."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    specs: list[Any] = []
    for position, (name, value) in enumerate(bound.items()):
        if isinstance(shapes, Mapping):
            spec = shapes.get(name)
        elif isinstance(shapes, Sequence) and position < len(shapes):
            spec = shapes[position]
        else:
            spec = None
        specs += _leaf_specs(value, spec)
    return {
        (position, axis): dim.__name__
        for position, spec in enumerate(specs)
        for axis, dim in (spec.items() if isinstance(spec, Mapping) else enumerate(spec or ()))
        if hasattr(dim, "__name__")
    }


def _widened(
    args: tuple[Any, ...], kwargs: dict[str, Any], asked: Mapping[tuple[int, int], str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs, dynamic dims of size 1 repeated to 2, which torch.export would fix, and none given twice.

    Tracing knows an input by its tensor: of one given twice, all reads would be of the last.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for position, axis in asked:
        leaf = leaves[position]
        if isinstance(leaf, Tensor) and leaf.shape[axis] == 1:
            leaves[position] = torch.cat((leaf, leaf), dim=axis)
    widened: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, structure)
    return widened


def refuse_unknown(graph: Graph) -> None:
    """Check that every op of the graph is in the table.

    Raises:
        UnsupportedOpError: naming each op that is not, with the layer and source line of its first use.
    """
    unknown: dict[str, fx.Node] = {}
    for module in graph.module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and ops.lookup(node.target) is None:
                    unknown.setdefault(_name(node.target), node)
    if not unknown:
        return
    places = []
    for name, node in sorted(unknown.items()):
        where = " ".join(part for part in (module_path(node), source_line(node)) if part)
        places.append(f"{name} (in {where})" if where else name)
    first = next(iter(sorted(unknown.items())))[1]
    raise UnsupportedOpError(
        f"{'ops' if len(places) > 1 else 'op'} not in the op table: {', '.join(places)}",
        node=f"%{first.name} = {_name(first.target)}(…)",
        remedy="write that part with ops that `mcc.ops.OPS` lists, or keep it outside the compiled model",
    )


def _name(target: Any) -> str:
    """An op's name; of a function of Python's its own, as in arithmetic on sizes."""
    return (
        ops.op_name(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )


def _rename(graph: Graph) -> None:
    """Name each call for the module it came from, with the op where a module makes several."""
    calls = [n for n in graph.nodes if n.op is not ops.GETITEM]
    per_module = Counter(module_path(n.fx) for n in calls if not is_foreign(n))
    wanted: list[str] = []
    for node in calls:
        path = module_path(node.fx).replace(".", "_")
        operation = ops.op_name(node.fx.target).partition(".")[0].strip("_")
        alone = per_module[module_path(node.fx)] == 1
        name = path if path and alone else f"{path}_{operation}" if path else operation
        wanted.append(name if name[0].isalpha() else f"{operation}_{path}")  # layers of a Sequential have numbers
    # a fresh namespace: names that export gave and dropped would otherwise push ours to `relu_1`
    namespace = fx.graph._Namespace()
    graph.module.graph._graph_namespace = namespace
    chosen = {n.fx: name for n, name in zip(calls, wanted, strict=True)}
    for node in graph.module.graph.nodes:
        name = chosen.get(node, node.name)
        node.name = namespace.create_name(name, node)
    graph.module.recompile()
