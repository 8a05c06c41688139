"""Stage 7: write the relax function: a call for each region's kernel, relax ops for the rest."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch
import tvm.tirx.script.builder.ir as B
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod
from tvm import relax, tirx
from tvm.sym.analyzer import Analyzer

from mcc import ops
from mcc.artifact import TensorSpec, stored_bytes, without_derived
from mcc.backends.cpu.attend import decodes_before_attention
from mcc.backends.cpu.fuse import requantize_step
from mcc.backends.cpu.kernels.lookup import lookup_function
from mcc.backends.cpu.kernels.tiles import leading_dims
from mcc.backends.cpu.lookups import lookups
from mcc.backends.cpu.microkernel import Parameter, flat, kernel_function, product
from mcc.backends.cpu.unweighted import (
    Unweighted,
    enlarged_before_cats,
    norms,
    scaled_before_quantizers,
    turned_before_products,
)
from mcc.backends.relax import RULES
from mcc.backends.relax.emitter import DTYPES, Emitter, Expression, is_tensor, known_dims
from mcc.constants import evaluate, has_symbols
from mcc.cost import LARGEST_GROWTH, weight_expression
from mcc.errors import BackendError, MccError
from mcc.report import LayerRow
from mcc.text import dim_text, located_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.lowering import Choice, Lowering
    from mcc.backends.kernel import Region
    from mcc.graph import Graph, Node
    from mcc.slabs import Derived

_SORTS = (ops.OPS["sort"], ops.OPS["topk"])
_IGNORED_OPTIONS = ("device", "layout", "pin_memory", "non_blocking", "copy", "memory_format")


def emit(lowering: Lowering) -> Lowering:
    """Emit `main(inputs…, weights)`; weights are one tuple, so that a call passes one argument for all of them."""
    writer = _Writer(lowering)
    module = writer.write()
    return replace(
        lowering, module=module, weights=writer.weights, derived=tuple(writer.derived), inputs=writer.input_specs(),
        outputs=writer.output_specs(), layers=tuple(writer.layers),
        sorts=any(n.op in _SORTS for n in lowering.graph.nodes),
    )  # fmt: skip


class Sizes:
    """Symbolic dims: torch's symbols as tirx variables."""

    def __init__(self) -> None:
        self._variables: dict[str, Any] = {}

    def expression(self, size: int | torch.SymInt) -> Expression:
        """A dim as relax wants it."""
        return int(size) if isinstance(size, int) else self._convert(size.node.expr)

    def shape(self, value: Tensor) -> list[Expression]:
        """All dims of a fake tensor."""
        return [self.expression(s) for s in value.shape]

    def of_inputs(self, values: Sequence[Tensor]) -> list[list[Expression]]:
        """Dims that inputs are declared with: a variable each where relax could not solve for it.

        Of a dim such as 32 s, where nothing is s itself, the variable is the dim, and s is computed from it.
        """
        dims = [[s if isinstance(s, int) else s.node.expr for s in value.shape] for value in values]
        plain = {d for shape in dims for d in shape if isinstance(d, sympy.Symbol)}

        def declared(dim: Any) -> Expression:
            symbols = () if isinstance(dim, int) else tuple(dim.free_symbols - plain)
            if len(symbols) != 1 or str(symbols[0]) in self._variables:
                return self._convert(dim)
            factor, rest = dim.coeff(symbols[0]), dim.subs(symbols[0], 0)
            variable = tirx.Var(f"{symbols[0]}_dim", "int64")
            self._variables[str(symbols[0])] = tirx.floordiv(variable - int(rest), int(factor))
            return variable

        return [[declared(dim) for dim in shape] for shape in dims]

    def _convert(self, expression: sympy.Expr) -> Expression:
        if isinstance(expression, sympy.Integer | int):
            return tirx.IntImm("int64", int(expression))
        if isinstance(expression, sympy.Symbol):
            return self._variables.setdefault(str(expression), tirx.Var(str(expression), "int64"))
        parts = [self._convert(a) for a in expression.args]
        if isinstance(expression, sympy.Add):
            return reduce(operator.add, parts)
        if isinstance(expression, sympy.Mul):
            return reduce(operator.mul, parts)
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            return reduce(operator.mul, [parts[0]] * int(expression.exp))
        if isinstance(expression, FloorDiv):
            return tirx.floordiv(*parts)
        if isinstance(expression, Mod | PythonMod):
            return tirx.floormod(*parts)
        if type(expression).__name__ in ("Max", "Min"):
            return reduce(tirx.max if type(expression).__name__ == "Max" else tirx.min, parts)
        raise BackendError(f"cannot compute the size {expression}", remedy="leave that dim out of dynamic_shapes")


class _Writer:
    """Writes one graph."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.graph: Graph = lowering.graph
        self.sizes = Sizes()
        self.weights: dict[str, NDArray[Any]] = {}
        self.derived: dict[Derived, None] = {}
        self.layers: list[LayerRow] = []
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.returned: set[fx.Node] = set()
        self.absorbed = self._absorbed()
        self.lookups = lookups(lowering)
        own_norms = norms(self.graph, lowering.target)
        taken_in = {n for norm in own_norms.values() for n in norm.inner} | enlarged_before_cats(self.graph)
        taken_in |= scaled_before_quantizers(self.graph)
        taken_in |= decodes_before_attention(self.graph, lowering.target) | turned_before_products(self.graph)
        self.merged = taken_in - set(lowering.choices)
        self.unweighted = Unweighted(
            lowering.target, self._value, own_norms, self.merged, lambda node: self.sizes.shape(node.value)
        )
        self.live = self._live()

    def _absorbed(self) -> set[fx.Node]:
        """Nodes inside regions, whose values nobody outside reads."""
        inside: set[fx.Node] = set()
        for choice in self.lowering.choices.values():
            inside |= {node.fx for node in choice.region.inner}
        return inside

    def _live(self) -> set[fx.Node]:
        """Nodes whose values are needed once regions read codes and stored weights themselves."""
        live: set[fx.Node] = set()
        queue = [n.fx for n in self.graph.output_nodes]
        while queue:
            node = queue.pop()
            if node in live:
                continue
            live.add(node)
            choice = self.lowering.choices.get(node)
            queue += _read_by(choice.region) if choice is not None else self._operands(node)
        return live

    def write(self) -> Any:
        self._evaluate_constants()
        self._collect_weights()
        builder = relax.BlockBuilder()
        inputs = self._inputs()
        types = [relax.TensorType(a.shape, a.dtype.name) for a in self.weights.values()]
        weights = relax.Var("weights", relax.TupleType(types))
        with builder.function("main", [*inputs, weights], attrs={"num_input": len(inputs)}):
            for node, declared in zip(self.graph.inputs, inputs, strict=True):
                wanted = relax.TensorType(self.sizes.shape(node.value), DTYPES[node.dtype])
                same = str(wanted) == str(declared.ty)
                self.values[node.fx] = declared if same else builder.match_cast(declared, wanted)
            with builder.dataflow():
                emitter = Emitter(builder)
                self._read = {n: emitter.item(weights, i) for i, n in enumerate(self.weights)}
                hidden = self.absorbed | self.merged | set(self.constants)
                for node in self.graph.nodes:
                    if node.fx in self.live and node.fx not in hidden:
                        self.values[node.fx] = self._node(emitter, node)
                outputs = [self._output(emitter, n) for n in self.graph.output_nodes]
                result = builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            builder.emit_func_output(result)
        return builder.get()

    def _inputs(self) -> list[Any]:
        for node in self.graph.inputs:
            if not isinstance(node.value, Tensor):
                raise BackendError(
                    f"input {node.name} is not a tensor but {node.value!r}", remedy="make it a constant of the module"
                )
        shapes = self.sizes.of_inputs([node.value for node in self.graph.inputs])
        types = [relax.TensorType(dims, DTYPES[n.dtype]) for n, dims in zip(self.graph.inputs, shapes, strict=True)]
        return [relax.Var(node.name, kind) for node, kind in zip(self.graph.inputs, types, strict=True)]

    def _evaluate_constants(self) -> None:
        """Run what reads only stored tensors in PyTorch: decodes that no kernel takes, masks, folded arithmetic."""
        for node in self.graph.nodes:
            inputs = node.fx.all_input_nodes
            known = all(n in self.constants or n.op == "get_attr" for n in inputs)
            kept = node.fx in self.lowering.choices or node.fx in self.lookups
            if node.fx not in self.live or not known or kept:
                continue
            if not has_symbols(node.fx) and not _grows(node):
                self.constants[node.fx] = evaluate(node.fx, self._constant)

    def _constant(self, node: fx.Node) -> Any:
        return self.constants[node] if node in self.constants else self.graph.tensor(str(node.target))

    def _collect_weights(self) -> None:
        """Name every array the function reads: packed ones of kernels, then tensors read by other ops."""
        self._name_packed()
        for node in [n for n in self.graph.module.graph.nodes if n in self.live]:
            chosen = self.lowering.choices.get(node)
            reads = self._operands(node) if chosen is None else _read_by(chosen.region)
            for read in reads:
                if node in self.constants or node in self.absorbed:
                    continue
                if read.op == "get_attr" or isinstance(self.constants.get(read), Tensor):
                    self._store(read)

        for node in [n.fx for n in self.graph.output_nodes]:
            if node.op == "get_attr" or isinstance(self.constants.get(node), Tensor):
                self._store(node)

    def _name_packed(self) -> None:
        self.packed: dict[fx.Node, list[str]] = {}
        for output, choice in self.lowering.choices.items():
            names = []
            for part, array in choice.lowered.packed.items():
                name = f"{choice.region.weight.name}#{part}"
                while name in self.weights and not _same(self.weights[name], array):
                    name += "'"  # the same weight packed in another way for another layer
                self.weights[name] = array
                names.append(name)
            self.packed[output] = names
            if (made := choice.lowered.derived) is not None:
                own = made.named(dict(zip(choice.lowered.packed, names, strict=True)))
                self.derived[own] = None  # once for all layers that share it
        for node, lookup in self.lookups.items():
            if node not in self.live:
                continue
            if lookup.tied is not None:
                self.packed[node] = self.packed[lookup.tied]
            else:
                named = {f"{lookup.name}#rows.{part}": a for part, a in lookup.arrays.items()}
                self.weights |= named
                self.packed[node] = list(named)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """What an op reads at run time: not a scale that is in a quantize kernel's code, nor rows that stand packed."""
        if node in self.lookups:
            return [node.args[1]]  # type: ignore[list-item]  # row numbers are a tensor
        if ops.lookup(node.target) is ops.QUANTIZE and requantize_step(self.graph.node(node.name)) is not None:
            return node.all_input_nodes[:1]
        if node in self.merged and ops.lookup(node.target) is ops.RESCALE:
            return node.all_input_nodes[:1]
        return node.all_input_nodes

    def _store(self, node: fx.Node) -> None:
        name = str(node.target) if node.op == "get_attr" else f"computed.{node.name}"
        tensor = self._constant(node).detach().contiguous()
        self.weights[name] = tensor.numpy()

    def _value(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            return self._read[str(node.target)]
        constant = self.constants[node]
        return self._read[f"computed.{node.name}"] if isinstance(constant, Tensor) else constant

    def _node(self, emitter: Emitter, node: Node) -> Any:
        value = node.value
        if isinstance(value, torch.SymInt | int):
            return self.sizes.expression(value)
        choice = self.lowering.choices.get(node.fx)
        if choice is not None:
            return self._kernel_call(emitter, choice)
        if node.op is ops.GETITEM:
            source = node.operand(0)
            assert source is not None
            item = self._value(source.fx)[node.fx.args[1]]
            # FuseOps loses items of what a kernel gives several of, where what it fuses reads more than one
            return self._copied(emitter, item) if source.op in ops.RECURRENT else item
        if node.fx in self.lookups:
            return self._lookup(emitter, node)
        assert node.op is not None
        own = self.unweighted.call(emitter, node)
        if own is not None:
            if node.op.macs(node.fx):
                name = node.op.name.removeprefix("mcc.")
                stored, reason = (self.unweighted.stored_text(node), 0), self.unweighted.reason(node)
                self._row(node, name, self.unweighted.kernel_name(node), stored, reason)
            return own
        rule = RULES.get(node.op.name)
        if rule is None:
            raise BackendError(
                f"the CPU backend has no lowering for {node.op.name}", node=located_text(node),
                remedy="write that part with other ops of the table",
            )  # fmt: skip
        top = node.weight_operand if node.op is ops.EMBEDDING else None
        if node.op.macs(node.fx) or (top is not None and not top.is_parameter):
            self._fallback_row(node)
        emitter.expected = self.sizes.shape(value) if isinstance(value, Tensor) else None
        return self._expected(emitter, self._apply(rule, emitter, node), value)

    def _apply(self, rule: Any, emitter: Emitter, node: Node) -> Any:
        def argument(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return self._value(leaf)
            return self.sizes.expression(leaf) if isinstance(leaf, torch.SymInt) else leaf

        args = [pytree.tree_map(argument, _plain(a)) for a in node.fx.args]
        options = {k: argument(v) for k, v in node.fx.kwargs.items() if k not in _IGNORED_OPTIONS}
        try:
            return rule(emitter, *args, **options)
        except MccError:
            raise
        except Exception as error:
            raise BackendError(
                f"lowering {node.op} failed: {str(error).strip().splitlines()[0] if str(error) else repr(error)}",
                node=located_text(node), remedy="please report this with the model",
            ) from error  # fmt: skip

    def _expected(self, emitter: Emitter, result: Any, value: Any) -> Any:
        """State the shape the graph knows, where relax inferred another form of it."""
        if not is_tensor(result) or not isinstance(value, Tensor):
            return result
        wanted = self.sizes.shape(value)
        if str(result.ty.dtype) != DTYPES[value.dtype]:
            raise BackendError(f"a lowering rule gave {result.ty.dtype} where the graph has {value.dtype}")
        analyzer = Analyzer()
        if len(wanted) == len(result.ty.shape) and all(
            analyzer.can_prove_equal(a, b) for a, b in zip(result.ty.shape, wanted, strict=True)
        ):
            return result
        # not match_cast: FuseTIR crashes the process on one
        return emitter(relax.op.reshape(result, wanted))

    def _kernel_call(self, emitter: Emitter, choice: Choice) -> Any:
        region = choice.region
        name = f"{choice.kernel.name}_{'_'.join(map(str, region.weight.shape))}"
        function = emitter.builder.add_func(choice.lowered.function.without_attr("global_symbol"), name)
        packed = (self._read[n] for n in self.packed[region.output.fx])
        operands = [*(self._value(node) for node in _read_by(region)), *packed]
        output = relax.TensorType(self.sizes.shape(region.output.value), region.output_dtype)
        made = choice.lowered.derived
        held = without_derived(choice.lowered.packed, () if made is None else (made,))
        self._row(
            region.anchor,
            region.text,
            f"{choice.kernel.name} {choice.tile}",
            (region.weight.text, sum(map(stored_bytes, held.values()))),
            choice.reason,
        )
        return emitter(relax.call_tir(function, operands, output))

    def _lookup(self, emitter: Emitter, node: Node) -> Any:
        lookup, names = self.lookups[node.fx], self.packed[node.fx]
        numbers = self._value(self._operands(node.fx)[0])
        arrays = dict(zip(lookup.arrays, (self.weights[n] for n in names), strict=True))
        function = lookup_function(known_dims(numbers), str(numbers.ty.dtype), lookup.shape, arrays, lookup.element)
        added = emitter.builder.add_func(function, "lookup")
        stored = 0 if lookup.tied is not None else sum(stored_bytes(a) for a in arrays.values())
        self._row(node, "embedding", "lookup", (lookup.text, stored), "")
        output = relax.TensorType(self.sizes.shape(node.value), "float32")
        return emitter(relax.call_tir(added, [numbers, *(self._read[n] for n in names)], output))

    def _fallback_row(self, node: Node) -> None:
        stored, size = "float32", 0
        top = node.weight_operand
        expression = weight_expression(top)
        if expression is not None and top is not None:
            size = int(np.prod([int(s) for s in top.shape])) * 4
        reason = self.lowering.refused.get(node.fx, "no kernel reads rows of it" if node.op is ops.EMBEDDING else "")
        if expression is not None and not (top is not None and top.is_parameter):
            reason = f"weight decoded at build time: {reason}"
        assert node.op is not None
        self._row(node, node.op.name, "op library", (stored if size else "", size), reason)

    def _row(self, node: Node, op: str, kernel: str, stored: tuple[str, int], reason: str) -> None:
        assert node.op is not None
        self.layers.append(LayerRow(node.layer, op, kernel, stored[0], stored[1], node.op.macs(node.fx), reason))

    def _output(self, emitter: Emitter, node: Node) -> Any:
        """An output of its own memory: an input, a weight or a view of one is copied, and so is a second return."""
        value = self._value(node.fx)
        root: fx.Node = node.fx
        while root not in self.constants and self._shares(emitter.builder, root):
            root = root.all_input_nodes[0]
        own = root.op == "call_function" and root not in self.constants
        if own and root not in self.returned:
            self.returned.add(root)
            return value
        return self._copied(emitter, value)

    def _copied(self, emitter: Emitter, value: Any) -> Any:
        value = emitter.builder.normalize(value)
        function = emitter.builder.add_func(_copy(value), "copy")
        return emitter(relax.call_tir(function, [value], relax.TensorType(list(value.ty.shape), str(value.ty.dtype))))

    def _shares(self, builder: relax.BlockBuilder, node: fx.Node) -> bool:
        """Whether a value may lie in the memory of the node's first input."""
        row = ops.lookup(node.target)
        if row is None or not node.all_input_nodes:
            return False
        value, source = self.values.get(node), self.values.get(node.all_input_nodes[0])
        while row.family != "move" and isinstance(value, relax.Var) and not value.same_as(source):
            value = builder.lookup_binding(value)
        return row.family == "move" or isinstance(value, relax.Var)

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Inputs; one that only kernels read may lie anywhere."""
        specs = []
        for node in self.graph.inputs:
            unaligned = self._only_kernels_read(node.fx) and not node.is_output
            kind = DTYPES[node.dtype]
            alignment = {"alignment": np.dtype(kind).itemsize} if unaligned else {}
            specs.append(TensorSpec(str(node.fx.target), self._dims(node), kind, **alignment))
        return tuple(specs)

    def _only_kernels_read(self, source: fx.Node) -> bool:
        """Whether a value, or a view of it, is read by own kernels alone: they take any address."""
        for reader in source.users:
            if reader not in self.live or reader in self.absorbed or ops.lookup(reader.target) is ops.SYM_SIZE:
                continue
            if ops.lookup(reader.target) is ops.RESHAPE and not self.graph.node(reader.name).is_output:
                if not self._only_kernels_read(reader):
                    return False
            elif ops.lookup(reader.target) is ops.QUANTIZE:
                if requantize_step(self.graph.node(reader.name)) is None:
                    return False
            elif not any(
                c.region.source.fx is source and c.region.anchor.fx is reader for c in self.lowering.choices.values()
            ):
                return False
        return True

    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Outputs, flattened."""
        named = zip(self.graph.signature.outputs, self.graph.output_nodes, strict=True)
        return tuple(TensorSpec(name, self._dims(n), DTYPES[n.dtype]) for name, n in named)

    def _dims(self, node: Node) -> tuple[int | str, ...]:
        return tuple(int(s) if isinstance(s, int) else dim_text(s, self.graph) for s in node.shape)


def _read_by(region: Region) -> list[fx.Node]:
    """What a region's kernel reads at run time besides weights, in the order of its parameters."""
    return [region.source.fx, *(operand.fx for operand in region.operands)]


def _copy(value: Any) -> tirx.PrimFunc:
    """A kernel that copies: relax would take a computation that does for a reshape, and return the input itself."""
    dims, kind = leading_dims(known_dims(value)), str(value.ty.dtype)

    def body(source: Expression, result: Expression) -> None:
        size = product(dims)
        from_flat, to_flat = flat(source, size), flat(result, size)
        with B.serial(0, size) as i:
            B.buffer_store(to_flat, from_flat[i], [i])

    function = kernel_function("copy", [Parameter("X", dims, kind), Parameter("Y", dims, kind)], body)
    return function.without_attr("global_symbol")


def _plain(argument: Any) -> Any:
    """Fx's immutable lists as plain ones."""
    return [_plain(a) for a in argument] if isinstance(argument, list | tuple) else argument


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


def _grows(node: Node) -> bool:
    """Whether a constant, such as a small tensor expanded, is better computed at every call than stored."""
    if node.op is None or node.op.family == "compression" or not isinstance(node.value, Tensor):
        return False
    read = sum(n.meta["val"].nbytes for n in node.fx.all_input_nodes if isinstance(n.meta["val"], Tensor))
    return bool(node.value.nbytes > max(LARGEST_GROWTH, read))
