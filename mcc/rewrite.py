"""What a pass is: a frozen dataclass with a guarantee, run over a graph, or match and rewrite node by node."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.errors import PassError
from mcc.graph import Graph, Node
from mcc.report import Declined
from mcc.spec import full_text, kebab_case, pass_text
from mcc.text import located_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress

    from mcc.data import Data
    from mcc.target import Target


@dataclass(frozen=True)
class Exact:
    """The graph computes what it computed before, within float rounding."""


@dataclass(frozen=True)
class Within:
    """Outputs differ by at most atol + rtol * |value|."""

    rtol: float
    atol: float


@dataclass(frozen=True)
class Lossy:
    """The graph computes something else on purpose: what the pass's `reference` computes."""


Guarantee = Exact | Within | Lossy


@dataclass
class Context:
    """What a pass may use, and where it says what it did.

    Attributes:
        target: what the graph is compiled for.
        data: the user's data.
        seed: of every random choice.
        progress: a rich progress display for long work, or None.
        edits: changes made so far.
        declined: candidates not taken, with reasons.
        latency: median latency in ms of a graph's artifact on the target, or None where that cannot be measured.
        captured: the graph as it was before the first pass, not to be edited, or None.
        exact: the graph as it was before the first pass that is not exact, not to be edited, or None.
        notes: further facts for the report.
    """

    target: Target
    data: Data
    seed: int = 0
    progress: Progress | None = None
    latency: Callable[[Graph], float] | None = None
    captured: Graph | None = None
    exact: Graph | None = None
    edits: int = 0
    declined: list[Declined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def edited(self, count: int = 1) -> None:
        """Count changes."""
        self.edits += count

    def decline(self, node: Node, reason: str) -> None:
        """Say that a candidate was not taken."""
        self.declined.append(Declined(node.layer, reason))

    @property
    def reasons(self) -> str:
        """Every candidate that was not taken, and why, for an error that says there is none left."""
        return "; ".join(f"{d.layer}: {d.reason}" for d in self.declined) or "there is none"

    @contextmanager
    def shown(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show progress over so many steps, if it is shown at all; gives what to call behind each."""
        if self.progress is None:
            yield lambda: None
            return
        task = self.progress.add_task(label, total=total)
        try:
            yield partial(self.progress.advance, task)
        finally:
            self.progress.remove_task(task)

    def note(self, text: str) -> None:
        """Add a fact to the report."""
        self.notes.append(text)


class Pass:
    """A technique. Subclasses are frozen dataclasses: their fields are their options, their name is their class name.

    Attributes:
        guarantee: what is checked after the pass.
        ends_changes: whether passes behind it may only be exact.
        changes_signature: whether inputs and outputs may change; then `convert_inputs` says how, and `reference` has
            the new ones.
    """

    guarantee: ClassVar[Guarantee]
    ends_changes: ClassVar[bool] = False
    changes_signature: ClassVar[bool] = False

    @property
    def needs_data(self) -> tuple[str, ...]:
        """The fields of `mcc.Data` this pass cannot do without."""
        return ()

    @property
    def needs_after(self) -> tuple[str, ...]:
        """Names of passes of which one must come later in the list."""
        return ()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Return the changed graph; `graph` is the pass's own and may be edited in place."""
        raise NotImplementedError

    def reference(self, before: Graph, after: Graph) -> Graph | None:
        """What `after` must compute, built from `before` in plain PyTorch; None leaves only shapes to check."""
        del before, after
        return None

    def convert_inputs(self, before: Graph, after: Graph, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What `after` takes where `before` takes `inputs`, flat and in call order."""
        del before, after
        return tuple(inputs)

    @classmethod
    def pass_name(cls) -> str:
        """The pass's name in text form."""
        return kebab_case(cls.__name__)

    def full_text(self) -> str:
        """The pass as text, defaults included."""
        return full_text(self)  # type: ignore[arg-type]  # subclasses are dataclasses

    def __str__(self) -> str:
        return pass_text(self)  # type: ignore[arg-type]  # subclasses are dataclasses


class Match:
    """A place a rewrite takes: the node and whatever facts `match` found, as attributes."""

    def __init__(self, node: Node, **facts: Any) -> None:
        self.node = node
        self._facts = facts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._facts:
            raise AttributeError(name)
        return self._facts[name]


@dataclass(frozen=True)
class Reject:
    """A place a rewrite does not take.

    Attributes:
        node: the node.
        reason: why, for the report; None where the node is not even a candidate.
    """

    node: Node
    reason: str | None

    @classmethod
    def other_op(cls, node: Node) -> Reject:
        """Not a candidate: nothing to report."""
        return cls(node, None)


class Rewriter:
    """Makes nodes in front of the one that is being replaced."""

    def __init__(self, graph: Graph, place: Node) -> None:
        self.graph = graph
        self.place = place

    def call(self, op: ops.Op, *args: object, **kwargs: object) -> Node:
        """Add a call; `Node` arguments are read, `str` never stands for a parameter (use `read`)."""
        plain: Any = pytree.tree_map(_unwrap, args)
        named: Any = pytree.tree_map(_unwrap, kwargs)
        with self.graph.module.graph.inserting_before(self.place.fx):
            made = self.graph.module.graph.call_function(op.target, plain, named)
        made.meta = {k: v for k, v in self.place.fx.meta.items() if k in ("nn_module_stack", "stack_trace")}
        propagator = FakeTensorProp(self.graph.module, self.graph.fake_mode)
        propagator.env = {n: n.meta["val"] for n in made.all_input_nodes}
        with self.graph.computing_shapes():
            arguments, keywords = propagator.fetch_args_kwargs_from_env(made)
            made.meta["val"] = op.target(*arguments, **keywords)
        return Node(made, self.graph)

    def read(self, name: str, tensor: Tensor | None = None) -> Node:
        """Read the tensor `name`; with `tensor`, store that under `name` first, or `name_2` and so on if taken."""
        if tensor is not None:
            name = self.graph.free_name(name)
            self.graph.set_tensor(name, tensor)
        return self.graph.read(name, self.place)

    def insert(self, function: Callable[..., Any], *operands: Node) -> Node:
        """Add the ATen calls that `function`, plain PyTorch, makes on these operands."""
        with self.graph.computing_shapes():
            traced = make_fx(function, pre_dispatch=True)(*(o.value for o in operands))
        inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
        made: dict[fx.Node, Any] = dict(zip(inputs, (o.fx for o in operands), strict=True))
        with self.graph.module.graph.inserting_before(self.place.fx):
            for node in traced.graph.nodes:
                if node.op == "output":
                    result = made[node.args[0]]
                elif node.op != "placeholder":
                    made[node] = self.graph.module.graph.node_copy(node, made.__getitem__)
        return Node(result, self.graph)


def _unwrap(argument: Any) -> Any:
    return argument.fx if isinstance(argument, Node) else argument


class Rewrite(Pass):
    """A pass that looks at each node on its own.

    Either define `match` and `rewrite`, or `pattern` and `replacement`: two functions of the same parameters, the
    first written in ATen ops (`torch.ops.aten…`), the second in any PyTorch. In a pattern each parameter binds what
    stands there (a node or a literal), the same parameter the same thing; operands of commuting ops match either way.
    """

    pattern: ClassVar[Callable[..., Any] | None] = None
    replacement: ClassVar[Callable[..., Any] | None] = None

    def match(self, node: Node) -> Match | Reject:
        """Whether to rewrite at `node`; must not edit the graph."""
        if self.pattern is None or self.replacement is None:
            raise PassError(
                f"{self.pass_name()} defines neither match and rewrite nor pattern and replacement",
                remedy="see docs/writing-a-pass.md",
            )
        tree, names = _traced_pattern(type(self))
        bound: dict[str, Any] = {}
        inner: list[fx.Node] = []
        if not _bind(tree, node.fx, bound, inner):
            return Reject.other_op(node)
        escaping = [n for n in inner[1:] if any(u not in inner for u in n.users)]
        if escaping:
            return Reject(node, f"%{escaping[0].name} inside the pattern is used elsewhere")
        return Match(node, bound={n: bound.get(n) for n in names})

    def rewrite(self, match: Match, rewriter: Rewriter) -> Node:
        """Make the nodes that replace `match.node` and return the one that gives its value."""
        bound = match.bound
        names = [n for n, v in bound.items() if isinstance(v, fx.Node)]
        literals = {n: v for n, v in bound.items() if not isinstance(v, fx.Node)}
        replacement = type(self).__dict__["replacement"]

        def body(*tensors: Tensor) -> Any:
            return replacement(self, **dict(zip(names, tensors, strict=True)), **literals)

        return rewriter.insert(body, *(Node(bound[n], rewriter.graph) for n in names))

    def run(self, graph: Graph, context: Context) -> Graph:
        """Visit every node once, in order; what a rewrite makes is not visited again."""
        for node in graph.nodes:
            if node.fx._erased:
                continue
            decision = self.match(node)
            if isinstance(decision, Reject):
                if decision.reason is not None:
                    context.decline(decision.node, decision.reason)
                continue
            made = self.rewrite(decision, Rewriter(graph, node))
            if made.fx is not node.fx:
                if made.value.shape != node.value.shape:
                    raise PassError(
                        f"{self}: the replacement has shape {tuple(made.shape)}, the node {tuple(node.shape)}",
                        node=located_text(node),
                        remedy="make `rewrite` return a node of the same shape",
                    )
                made.take_place_of(node)
            context.edited()
        return graph.clean()


def _traced_pattern(kind: type[Rewrite]) -> tuple[fx.Node, list[str]]:
    function = kind.__dict__["pattern"]
    names = list(inspect.signature(function).parameters)[1:]
    traced = fx.Tracer().trace(function)
    for node in traced.nodes:
        if (node.op == "call_function" and ops.lookup(node.target) is None) or node.op in (
            "call_method",
            "call_module",
        ):
            raise PassError(
                f"{kind.pass_name()}: the pattern calls {node.target}, which is not an op of the table",
                remedy="write patterns in ATen ops, such as torch.ops.aten.relu.default(x)",
            )
    tree = traced.output_node().args[0]
    assert isinstance(tree, fx.Node)
    return tree, names


def _operand_orders(pattern: fx.Node, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield args
    row = ops.lookup(pattern.target)
    if row is not None and row.commutes and len(args) >= 2:
        yield (args[1], args[0], *args[2:])


def _all_arguments(call: fx.Node) -> tuple[Any, ...]:
    """Arguments in the order of the schema, defaults filled in: the pattern add(x, y) is not add(x, y, alpha=2)."""
    if not isinstance(call.target, torch._ops.OpOverload):
        return (*call.args, *call.kwargs.values())
    schema = call.target._schema.arguments
    rest = (call.kwargs.get(a.name, a.default_value) for a in schema[len(call.args) :])
    return (*call.args, *rest)


def _bind(pattern: Any, found: Any, bound: dict[str, Any], inner: list[fx.Node]) -> bool:
    """Bind the pattern's parameters to what stands at `found`; `bound` and `inner` change only on success."""
    if isinstance(pattern, fx.Node) and pattern.op == "placeholder":
        name = str(pattern.target)
        if name in bound:
            return bound[name] is found or (not isinstance(found, fx.Node) and bool(bound[name] == found))
        bound[name] = found
        return True
    if not isinstance(pattern, fx.Node):
        return not isinstance(found, fx.Node) and bool(pattern == found)
    if not isinstance(found, fx.Node) or found.target is not pattern.target:
        return False
    wanted = _all_arguments(pattern)
    for args in _operand_orders(pattern, _all_arguments(found)):
        trial, seen = dict(bound), [*inner, found]
        if len(args) == len(wanted) and all(_bind(p, a, trial, seen) for p, a in zip(wanted, args, strict=True)):
            bound.update(trial)
            inner[:] = seen
            return True
    return False
