"""The graph every pass works on: a torch.fx graph of ATen ops with its parameters, shapes and origin."""

from __future__ import annotations

import copy
import itertools
import keyword
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.errors import MccError
from mcc.text import graph_text

WEIGHT_WRAPPERS = (
    ops.MUL, ops.FAKE_QUANTIZE, ops.DEQUANTIZE, *ops.WITHOUT_ZEROS, ops.UNPACK, ops.QUANTIZE, ops.FAKE_CODEBOOK,
    ops.DECODE_CODEBOOK, ops.ROUND_BFLOAT16, ops.DECODE_BFLOAT16,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Node:
    """One call, input or parameter of a graph.

    Attributes:
        fx: the torch.fx node.
        graph: the graph it belongs to.
    """

    fx: fx.Node
    graph: Graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and other.fx is self.fx

    def __hash__(self) -> int:
        return hash(self.fx)

    @property
    def name(self) -> str:
        """The node's name, unique in its graph."""
        return self.fx.name

    @property
    def op(self) -> ops.Op | None:
        """The row of the op table; None for an input or a parameter."""
        return ops.lookup(self.fx.target) if self.fx.op == "call_function" else None

    @property
    def value(self) -> Any:
        """The fake value: shape, dtype and symbolic dims."""
        return self.fx.meta["val"]

    @property
    def shape(self) -> tuple[int | torch.SymInt, ...]:
        """Dims, symbolic ones as torch.SymInt."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        dtype: torch.dtype = self.value.dtype
        return dtype

    def argument(self, position: int, default: object = None) -> Any:
        """The raw argument at `position`, given by place or by keyword, or `default`."""
        if position < len(self.fx.args):
            return self.fx.args[position]
        if isinstance(self.fx.target, torch._ops.OpOverload):
            arguments = self.fx.target._schema.arguments
            if position < len(arguments):
                return self.fx.kwargs.get(arguments[position].name, default)
        return default

    def set_argument(self, position: int, value: Any) -> None:
        """Replace the argument at `position`, or give it by keyword where it was left out."""
        if position < len(self.fx.args):
            self.fx.update_arg(position, value)
            return
        assert isinstance(self.fx.target, torch._ops.OpOverload)
        self.fx.update_kwarg(self.fx.target._schema.arguments[position].name, value)

    def operand(self, position: int) -> Node | None:
        """The node at argument `position`, or None."""
        argument = self.argument(position)
        return Node(argument, self.graph) if isinstance(argument, fx.Node) else None

    @property
    def users(self) -> tuple[Node, ...]:
        """The nodes that read this one; the graph's output is not among them."""
        return tuple(Node(user, self.graph) for user in self.fx.users if user.op != "output")

    @property
    def is_output(self) -> bool:
        """Whether the graph returns this value."""
        return any(user.op == "output" for user in self.fx.users)

    @property
    def is_parameter(self) -> bool:
        """Whether this reads a parameter or buffer."""
        return self.fx.op == "get_attr"

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer this node reads."""
        return self.graph.tensor(str(self.fx.target))

    def rename(self, name: str) -> None:
        """Give the node another name; one that is taken gets a number."""
        self.fx._rename(name)

    def take_place_of(self, old: Node) -> None:
        """Be read wherever `old` was, and bear its name if nothing reads it any more."""
        name = old.name
        old.fx.replace_all_uses_with(self.fx, delete_user_cb=lambda user: user is not self.fx)
        if not old.fx.users:
            self.graph.module.graph.erase_node(old.fx)
            if self.fx.op == "call_function":
                self.fx.name = name

    @property
    def weight_operand(self) -> Node | None:
        """The operand that is this op's weight; None where the op has none."""
        row = self.op
        return None if row is None or not row.weights else self.operand(row.weights[0])

    @property
    def weight(self) -> Node | None:
        """The node that reads this op's weight, through masks, quantizers and decodes; None where it is computed."""
        return weight_root(self.weight_operand)

    @property
    def layer(self) -> str:
        """The module this op came from: the one that owns its weight, else the innermost one on the call stack."""
        weight = self.weight
        if weight is not None:
            return str(weight.fx.target).rpartition(".")[0] or self.name
        return module_path(self.fx) or self.name

    @property
    def source(self) -> str:
        """File and line in the user's code, or empty."""
        return source_line(self.fx)


def identifier(tensor_name: str) -> str:
    """A node's name for a tensor: `c1.weight` gives c1_weight, `0.weight` (of a Sequential) weight_0."""
    path, _, leaf = tensor_name.rpartition(".")
    joined = tensor_name.replace(".", "_")
    return joined if joined[0].isalpha() else f"{leaf}_{path.replace('.', '_')}"


def _has_effect(node: fx.Node) -> bool:
    """Whether a node must stay though nothing reads it; fx would also keep dropout, for its random numbers."""
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def weight_root(node: Node | None) -> Node | None:
    """The parameter under a chain of mask, quantizer and decode ops, or None."""
    while node is not None and not node.is_parameter:
        if node.op not in WEIGHT_WRAPPERS:
            return None
        node = node.operand(0)
    return node


def module_path(node: fx.Node) -> str:
    """The innermost module on the node's call stack, as `named_modules` spells it, or empty."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = list(stack.values())[-1][0]
    return "" if path.startswith("_empty_nn_module_stack") else path  # torch's mark for code outside any module


def source_line(node: fx.Node) -> str:
    """`file.py:41` of the last line of the node's stack trace outside torch, or empty."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    frames = frames or [line for line in lines if line.startswith("File ")]
    if not frames:
        return ""
    file, line, *_ = frames[-1].removeprefix("File ").split(", ")
    return f"{file.strip(chr(34)).rpartition('/')[2]}:{line.removeprefix('line ')}"


@dataclass(frozen=True)
class Signature:
    """What goes into a graph and what leaves it.

    Attributes:
        inputs: names of the tensor inputs, in call order.
        outputs: names of the tensors returned, in order.
        output_tree: the returned structure, with output names as leaves: a str, list, tuple or dict of such.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_tree: object


class Graph:
    """A captured model: runs, trains, copies, and prints as stable text (`str(graph)`).

    Args:
        module: an ATen-level GraphModule with fake values in `node.meta["val"]`.
        dims: names of symbolic dims, by the symbol torch gave them.
        schedules: what changes tensors while the graph trains, such as gradual pruning.
    """

    def __init__(
        self, module: fx.GraphModule, dims: Mapping[str, str] | None = None, schedules: tuple[Schedule, ...] = ()
    ) -> None:
        self.module = module
        self.dims = dict(dims or {})
        self.schedules = schedules

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the graph in PyTorch on inputs of the captured structure."""
        return self.module(*args, **kwargs)

    def __str__(self) -> str:
        return graph_text(self)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every call, in topological order."""
        return tuple(Node(n, self) for n in self.module.graph.nodes if n.op == "call_function")

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The graph's inputs, in call order."""
        return tuple(Node(n, self) for n in self.module.graph.nodes if n.op == "placeholder")

    @property
    def output_nodes(self) -> tuple[Node, ...]:
        """The nodes whose values are returned, in order, flattened."""
        return tuple(Node(n, self) for n in pytree.tree_leaves(self._output.args[0]) if isinstance(n, fx.Node))

    @property
    def _output(self) -> fx.Node:
        output: fx.Node = self.module.graph.output_node()
        return output

    @property
    def signature(self) -> Signature:
        """Names and structure of inputs and outputs."""
        nodes = [n.name for n in self.output_nodes]
        # a value returned twice is two outputs
        leaves = [f"{n}#{k}" if (k := nodes[: i + 1].count(n)) > 1 else n for i, n in enumerate(nodes)]
        codegen: Any = self.module.graph._codegen
        info = getattr(codegen, "pytree_info", None)
        tree = pytree.tree_unflatten(leaves, info.out_spec) if info is not None else self._output.args[0]
        inputs = tuple(str(n.fx.target) for n in self.inputs if isinstance(n.value, Tensor))
        return Signature(inputs, tuple(leaves), _plain_tree(tree))

    def rename_inputs(self, names: Sequence[str]) -> None:
        """Give the inputs, in order, other names; where those are no identifiers, or taken, they stay as they are."""
        usable = [name.isidentifier() and not keyword.iskeyword(name) for name in names]
        kept = {node.name for node, renamed in zip(self.inputs, usable, strict=True) if not renamed}
        for node, name, renamed in zip(self.inputs, names, usable, strict=True):
            if renamed and name not in kept:
                node.rename(name)
                node.fx.target = name
        self.module.recompile()

    def node(self, name: str) -> Node:
        """The node called `name`.

        Raises:
            MccError: there is none.
        """
        for candidate in self.module.graph.nodes:
            if candidate.name == name:
                return Node(candidate, self)
        raise MccError(f"the graph has no node %{name}", remedy="print the graph to see its nodes")

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer called `name`, as the original model names it."""
        found: Tensor = operator.attrgetter(name)(self.module)
        return found

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Create or replace a tensor; it stays a parameter if it was one, and is a buffer otherwise."""
        owner, leaf = self._owner(name)
        old = owner._parameters.get(leaf)
        if old is not None:
            # in place of the Parameter object itself, so that tied names go on sharing it
            old.data = tensor
        else:
            owner.register_buffer(leaf, tensor)

    def remove_tensor(self, name: str) -> None:
        """Remove a tensor that no node reads."""
        owner, leaf = self._owner(name)
        delattr(owner, leaf)

    def free_name(self, name: str) -> str:
        """`name`, or the first of `name_2`, `name_3`, … that is not the name of a tensor or a module."""
        taken = {n for n, _ in self.module.named_parameters(remove_duplicate=False)}
        taken |= {n for n, _ in self.module.named_buffers(remove_duplicate=False)}
        taken |= {n for n, _ in self.module.named_modules(remove_duplicate=False)}
        candidates = (f"{name}_{i}" if i > 1 else name for i in itertools.count(1))
        return next(c for c in candidates if c not in taken)

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Create a trainable tensor."""
        owner, leaf = self._owner(name)
        owner.register_parameter(leaf, torch.nn.Parameter(tensor))

    def _owner(self, name: str) -> tuple[torch.nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        owner: torch.nn.Module = self.module
        for part in path.split(".") if path else ():
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf

    def read(self, name: str, before: Node) -> Node:
        """The node that reads tensor `name`; made in front of `before` if there is none ahead of it."""
        for candidate in self.module.graph.nodes:
            if candidate is before.fx:
                break
            if candidate.op == "get_attr" and candidate.target == name:
                return Node(candidate, self)
        with self.module.graph.inserting_before(before.fx):
            made = self.module.graph.get_attr(name)
        made.meta["val"] = self.fake_mode.from_tensor(self.tensor(name), static_shapes=True)
        return Node(made, self)

    def call(self, before: Node, target: Any, *args: Any) -> fx.Node:
        """A new call in front of a node, which it has the place in the user's code from."""
        with self.module.graph.inserting_before(before.fx):
            made = self.module.graph.call_function(target, args)
        made.meta = {k: v for k, v in before.fx.meta.items() if k in ("nn_module_stack", "stack_trace")}
        return made

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that holds the graph's symbolic dims."""
        for node in self.module.graph.nodes:
            for value in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, FakeTensor):
                    return value.fake_mode
        return FakeTensorMode()

    @contextmanager
    def computing_shapes(self) -> Iterator[FakeTensorMode]:
        """`fake_mode`, entered so that what PyTorch asks of symbolic dims is no condition that the graph has from then.

        It asks to choose between algorithms, such as whether a batch has 16 images.
        """
        mode = self.fake_mode
        environment = mode.shape_env
        unguarded = nullcontext() if environment is None else environment.suppress_guards()
        with mode, unguarded, enable_python_dispatcher():  # the last for lstm, gru and pad of symbolic sizes
            yield mode

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trainable tensors that the graph reads, under their original names, each once."""
        read = {n.target for n in self.module.graph.nodes if n.op == "get_attr"}
        for name, parameter in self.module.named_parameters():
            if name in read:
                yield name, parameter

    def train(self, *, batch_norm: bool = True) -> Self:
        """Switch dropout and, unless told otherwise, batch norm to training."""
        return self._set_mode(training=True, batch_norm=batch_norm)

    def eval(self) -> Self:
        """Switch batch norm and dropout to inference."""
        return self._set_mode(training=False, batch_norm=False)

    def _set_mode(self, *, training: bool, batch_norm: bool) -> Self:
        for node in self.nodes:
            row = node.op
            if row is ops.BATCH_NORM and node.operand(3) is None:
                continue  # without running statistics it normalizes by the batch in both modes
            if row is not None and row.train_flag is not None:
                args, flag = node.fx.args, batch_norm if row is ops.BATCH_NORM else training
                node.fx.args = (*args[: row.train_flag], flag, *args[row.train_flag + 1 :])
        self.module.train(training)
        self.module.recompile()
        return self

    def copy(self) -> Graph:
        """A deep copy; tied tensors stay tied."""
        return Graph(deep_copy(self.module), self.dims, self.schedules)

    def with_schedules(self, schedules: tuple[Schedule, ...]) -> Graph:
        """The same graph with other training schedules."""
        return Graph(self.module, self.dims, schedules)

    def clean(self) -> Self:
        """Remove what nothing reads, check well-formedness, and rebuild the code."""
        self.module.graph.eliminate_dead_code(_has_effect)
        self.module.graph.lint()
        self.module.recompile()
        return self

    def repropagate(self) -> Self:
        """Recompute every fake value after a rewrite, symbolic dims kept."""
        values = [n.meta["val"] for n in self.module.graph.nodes if n.op == "placeholder"]
        with self.computing_shapes() as mode:
            FakeTensorProp(self.module, mode).propagate_dont_convert_inputs(*values)
        return self


def deep_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a module that shares its calling convention, whose tree specs warn when they are copied."""
    codegen = module.graph._codegen
    module.graph._codegen = fx.graph.CodeGen()
    specs = [module.__dict__[name] for name in ("_in_spec", "_out_spec") if name in module.__dict__]
    try:
        made = copy.deepcopy(module, {id(spec): spec for spec in specs})
    finally:
        module.graph._codegen = codegen
    made.graph._codegen = codegen
    made.recompile()
    return made


@dataclass(frozen=True)
class Schedule:
    """Something that changes tensors of a graph while it trains."""

    def advance(self, graph: Graph, progress: float) -> None:
        """Bring `graph` to `progress`, in [0, 1], of the training that is under way; called before every step."""
        raise NotImplementedError

    def after_gradients(self, graph: Graph, progress: float) -> None:
        """Read or change the gradients of `graph`, between their computation and the optimizer's step."""


def _plain_tree(tree: object) -> object:
    if isinstance(tree, Mapping):
        return {str(key): _plain_tree(value) for key, value in tree.items()}
    if isinstance(tree, str) or tree is None:
        return tree
    if isinstance(tree, fx.Node):
        return tree.name
    if isinstance(tree, Sequence):
        leaves = [_plain_tree(value) for value in tree]
        return tuple(leaves) if isinstance(tree, tuple) else leaves
    return str(tree)
