"""Calls of own kernels for ops without weights of their own region: attention, norms, quantizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import relax

from mcc import ops
from mcc.attention_products import PRODUCTS
from mcc.backends.cpu.attend import ATTENTION, Attending, kernel_name, refusal
from mcc.backends.cpu.fuse import own_step, requantize_step
from mcc.backends.cpu.kernels.concatenate import SHORTEST_RUN, Part, concatenate_function, run_of
from mcc.backends.cpu.kernels.group_norm import GroupNormShape, group_norm_function
from mcc.backends.cpu.kernels.matmul import matmul_function, matmul_shape
from mcc.backends.cpu.kernels.norm import NormShape, norm_function
from mcc.backends.cpu.kernels.pool import FEWEST_CHANNELS, WIDEST_WINDOW, PoolShape, pool_function
from mcc.backends.cpu.kernels.quantize import quantize_function
from mcc.backends.cpu.kernels.recurrent import NARROWEST, PANEL_DIMS, RecurrentShape, recurrent_function
from mcc.backends.cpu.kernels.softmax import SoftmaxShape, softmax_function
from mcc.backends.cpu.kernels.transpose import takes_transpose, transpose_function
from mcc.backends.cpu.permutes import order_of
from mcc.backends.kernel import Requantize, Rescale, Scale, output_dtype
from mcc.backends.relax.emitter import known_dims, static
from mcc.errors import BackendError
from mcc.graph import Node
from mcc.ops import OPS
from mcc.text import located_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import fx

    from mcc.backends.kernel import EpilogueStep
    from mcc.backends.relax.emitter import Emitter
    from mcc.graph import Graph
    from mcc.target import Target

NORMS = (OPS["layer_norm"], OPS["rms_norm"])
GROUP_NORM = OPS["mcc.group_norm_nhwc"]
SOFTMAXES = (OPS["softmax.int"], OPS["log_softmax.int"])
MAX_POOL, AVG_POOL = OPS["mcc.max_pool2d_nhwc"], OPS["mcc.avg_pool2d_nhwc"]
FEWEST_ROWS = 4  # of a product, for which a copy of its right matrix pays


@dataclass(frozen=True)
class Norm:
    """A norm with what its kernel does besides: activations and a quantizer, where nothing else reads what is between.

    Attributes:
        node: the norm.
        steps: in order.
        inner: the nodes whose values are not computed by themselves.
    """

    node: Node
    steps: tuple[EpilogueStep, ...]
    inner: tuple[fx.Node, ...]


def norms(graph: Graph, target: Target) -> dict[fx.Node, Norm]:
    """The norms that have kernels, by the node whose value a kernel gives."""
    found = {}
    for node in graph.nodes:
        if not (takes_norm(node, target) or takes_group_norm(node, target)):
            continue
        last, inner = node, []
        steps: list[EpilogueStep] = []
        while not (steps and isinstance(steps[-1], Requantize)):
            users = last.users
            step = own_step(users[0]) if len(last.fx.users) == len(users) == 1 and users[0].operand(0) == last else None
            if step is None:
                break
            steps.append(step)
            inner.append(last.fx)
            last = users[0]
        found[last.fx] = Norm(node, tuple(steps), tuple(inner))
    return found


def takes_softmax(node: Node, target: Target) -> bool:
    """Whether the softmax kernel takes this node: float32, over a last dim that varies or has a vector and more."""
    source = node.operand(0)
    assert source is not None
    if source.dtype != node.dtype or str(node.dtype) != "torch.float32" or not node.shape:
        return False
    width = node.shape[-1]
    last = node.argument(1) % len(node.shape) == len(node.shape) - 1
    return last and (not isinstance(width, int) or width >= target.vector_lanes)


def turned_before_products(graph: Graph) -> set[fx.Node]:
    """Transposed matrices that stand on the right of products alone, whose kernel reads them as they are stored."""
    found = set()
    for node in graph.nodes:
        order = order_of(node)
        if order is None or len(order) < 2 or list(order) != [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
            continue
        readers = node.users
        if readers and not node.is_output and all(takes_matmul(u) and u.operand(0) != node for u in readers):
            found.add(node.fx)
    return found


def takes_matmul(node: Node) -> bool:
    """Whether the kernel of products takes this node: float32 matrices of a few rows and more."""
    operands = [node.operand(i) for i in (0, 1)] if node.op in PRODUCTS else []
    if not operands or any(x is None or str(x.dtype) != "torch.float32" or len(x.shape) < 2 for x in operands):
        return False
    rows = node.shape[-2]
    return not isinstance(rows, int) or rows >= FEWEST_ROWS


def scaled_before_quantizers(graph: Graph) -> set[fx.Node]:
    """Multiplications by one number whose products are quantized by own kernels, and read by nothing else."""
    found = set()
    for node in graph.nodes:
        readers = node.users
        if not isinstance(own_step(node), Scale | Rescale) or node.is_output or not readers:
            continue
        if all(u.op is ops.QUANTIZE and u.operand(0) == node and requantize_step(u) is not None for u in readers):
            found.add(node.fx)
    return found


def enlarged_before_cats(graph: Graph) -> set[fx.Node]:
    """Images made larger that the concatenation behind them takes in: nothing else reads them."""
    found = set()
    for cat in graph.nodes:
        # repeated pixels are whole runs only where the channels, which lie last, are joined
        if cat.op is OPS["cat"] and takes_cat(cat) and cat.argument(1, 0) % len(cat.shape) == len(cat.shape) - 1:
            sources = _concatenated(cat)
            found |= {s.fx for s in sources if _repeats(s) is not None and len(s.fx.users) == 1 and not s.is_output}
    return found


def _concatenated(node: Node) -> list[Node]:
    return [Node(n, node.graph) for n in node.argument(0)]


def _repeats(node: Node) -> tuple[int, int] | None:
    """The whole factors by which a node repeats the pixels of an image, channels last."""
    source = node.operand(0) if node.op is OPS["mcc.upsample_nhwc"] else None
    if source is None or node.argument(2) != "nearest":
        return None
    sizes = [(int(a), int(b)) for a, b in zip(node.shape[1:3], source.shape[1:3], strict=True)]
    return (sizes[0][0] // sizes[0][1], sizes[1][0] // sizes[1][1]) if all(a % b == 0 for a, b in sizes) else None


def takes_cat(node: Node) -> bool:
    """Whether the concatenation kernel takes this node: float32 or codes, in runs of some elements or of any length."""
    kind = str(node.dtype).removeprefix("torch.")
    rank = len(node.shape)
    dim = node.argument(1, 0) % max(rank, 1)
    sources = _concatenated(node)
    if kind not in ("float32", "uint8", "int8") or any(s.dtype != node.dtype or len(s.shape) != rank for s in sources):
        return False
    if not all(isinstance(size, int) for s in sources for size in s.shape[dim + 1 :]):
        return False
    runs = [run_of(Part(s.shape), dim) for s in sources]
    return None in runs or all(run is not None and run >= SHORTEST_RUN for run in runs)


def takes_norm(node: Node, target: Target) -> bool:
    """Whether the norm kernel takes this node: float32, over a fixed last dim of at least a vector."""
    if node.op not in NORMS or str(node.dtype) != "torch.float32" or len(node.argument(1)) != 1:
        return False
    affine = (node.operand(i) for i in (2, 3))
    plain = all(p is None or str(p.dtype) == "torch.float32" for p in affine)
    width = node.shape[-1]
    return plain and isinstance(width, int) and width >= target.vector_lanes


def takes_pool(node: Node) -> bool:
    """Whether the kernel of windows takes this node: images with channels last, of a few channels and more."""
    return (
        node.op in (MAX_POOL, AVG_POOL)
        and int(node.shape[3]) >= FEWEST_CHANNELS
        and node.argument(1)[1] <= WIDEST_WINDOW
    )


def takes_group_norm(node: Node, target: Target) -> bool:
    """Whether the kernel of group norms takes this node: images with channels last, a vector of channels and more."""
    return node.op is GROUP_NORM and int(node.shape[3]) >= target.vector_lanes


class Unweighted:
    """Emits these calls.

    Args:
        target: of the kernels.
        value: the relax value of a node.
        norms: see `norms`.
        merged: what else kernels take in: images that a concatenation enlarges, keys and values that attention decodes,
            transposed matrices.
        sizes: the dims of a node as relax has them.
    """

    def __init__(
        self, target: Target, value: Callable[[fx.Node], Any], norms: Mapping[fx.Node, Norm], merged: set[fx.Node],
        sizes: Callable[[Node], list[Any]],
    ) -> None:  # fmt: skip
        self.target = target
        self._norms = norms
        self._sizes = sizes
        self._value = value
        self._merged = merged
        self._attending = Attending(target, value, merged)

    def call(self, emitter: Emitter, node: Node) -> Any:
        """The value of a node that has an own kernel here, or None."""
        if node.op is ATTENTION:
            return self._attending.call(emitter, node)
        if node.op is OPS["cat"] and takes_cat(node):
            return self._cat(emitter, node)
        if node.op in ops.RECURRENT:
            return self._recurrent(emitter, node)
        if (norm := self._norms.get(node.fx)) is not None:
            return self._group_norm(emitter, norm) if norm.node.op is GROUP_NORM else self._norm(emitter, norm)
        if node.op in SOFTMAXES and takes_softmax(node, self.target):
            return self._softmax(emitter, node)
        if takes_matmul(node):
            return self._matmul(emitter, node)
        if takes_pool(node):
            return self._pool(emitter, node)
        if node.op is ops.QUANTIZE and (step := requantize_step(node)) is not None:
            return self._quantize(emitter, node, step)
        return self._transpose(emitter, node)

    def kernel_name(self, node: Node) -> str:
        """The kernel of a node that has an own one here, for the report."""
        assert node.op is not None
        return kernel_name(node, self.target) if node.op is ATTENTION else node.op.name.removeprefix("mcc.")

    def stored_text(self, node: Node) -> str:
        """How what a node reads is stored where it is no floats, for the report."""
        return self._attending.stored_text(node) if node.op is ATTENTION else ""

    def reason(self, node: Node) -> str:
        """Why a node does not read codes that it might, for the report; or empty."""
        return refusal(node, self.target) if node.op is ATTENTION else ""

    def _softmax(self, emitter: Emitter, node: Node) -> Any:
        source = self._value(node.fx.all_input_nodes[0])
        shape = SoftmaxShape(known_dims(source), node.op is OPS["log_softmax.int"])
        function = emitter.builder.add_func(softmax_function(shape, self.target), "softmax")
        return emitter(relax.call_tir(function, [source], relax.TensorType(list(source.ty.shape), "float32")))

    def _matmul(self, emitter: Emitter, node: Node) -> Any:
        left, right = node.operand(0), node.operand(1)
        assert left is not None
        assert right is not None
        turned = right.fx in self._merged
        operands = [self._value(left.fx), self._value(right.fx.all_input_nodes[0] if turned else right.fx)]
        shape = matmul_shape(*map(known_dims, operands), turned=turned)
        function = emitter.builder.add_func(matmul_function(shape, self.target), "matmul")
        return emitter(relax.call_tir(function, operands, relax.TensorType([*self._sizes(node)], "float32")))

    def _pool(self, emitter: Emitter, node: Node) -> Any:
        assert node.op is not None
        source, sizes = self._value(node.fx.all_input_nodes[0]), self._sizes(node)
        kernel, stride, padding = (tuple(node.argument(i)) for i in (1, 2, 3))
        kind = str(source.ty.dtype)
        result = [s if (n := static(s)) is None else n for s in sizes[1:3]]
        shape = PoolShape(
            known_dims(source), (result[0], result[1]), kernel, stride, padding[:2], node.op is MAX_POOL,
            node.op is MAX_POOL or bool(node.argument(4)), kind,
        )  # fmt: skip
        name = node.op.name.removeprefix("mcc.")
        function = emitter.builder.add_func(pool_function(shape, self.target), name)
        return emitter(relax.call_tir(function, [source], relax.TensorType(sizes, kind)))

    def _cat(self, emitter: Emitter, node: Node) -> Any:
        parts, read = [], []
        for source in _concatenated(node):
            factors = _repeats(source) if source.fx in self._merged else None
            read.append(self._value(source.fx if factors is None else source.fx.all_input_nodes[0]))
            parts.append(Part(known_dims(read[-1]), factors or (1, 1)))
        result = [*self._sizes(node)]
        known = tuple(s if (n := static(s)) is None else n for s in result)
        kind = str(read[0].ty.dtype)
        dim = node.argument(1, 0) % len(result)
        function = emitter.builder.add_func(concatenate_function(known, parts, dim, kind, self.target), "concatenate")
        return emitter(relax.call_tir(function, read, relax.TensorType(result, kind)))

    def _recurrent(self, emitter: Emitter, node: Node) -> Any:
        assert node.op is not None
        states = 2 if node.op is ops.LSTM else 1
        operands = [node.operand(i) for i in range(states + 3)]
        read = [self._value(n.fx) for n in operands if n is not None]
        hidden = known_dims(read[1])[1]
        if not isinstance(hidden, int) or hidden < NARROWEST or any(str(x.ty.dtype) != "float32" for x in read):
            raise BackendError(
                f"{node.op} of {hidden} units of {read[0].ty.dtype}", node=located_text(node),
                remedy=f"use float32, and {NARROWEST} units or more",
            )  # fmt: skip
        dims, weight = known_dims(read[0]), known_dims(read[1 + states])
        units = int(weight[-1]) if len(weight) == PANEL_DIMS else None
        shape = RecurrentShape(
            (dims[0], dims[1], int(dims[2])), dims[2] // hidden, hidden, units, operands[-1] is not None,
            node.argument(states + 3), node.argument(states + 4),
        )  # fmt: skip
        function = emitter.builder.add_func(recurrent_function(shape, self.target), node.op.name.removeprefix("mcc."))
        forms = [[*list(read[0].ty.shape)[:2], hidden], *(list(x.ty.shape) for x in read[1 : 1 + states])]
        return emitter(relax.call_tir(function, read, [relax.TensorType(form, "float32") for form in forms]))

    def _norm(self, emitter: Emitter, norm: Norm) -> Any:
        node = norm.node
        centered = node.op is OPS["layer_norm"]
        affine = [node.operand(i) for i in ((2, 3) if centered else (2,))]
        source = self._value(node.fx.all_input_nodes[0])
        eps = node.argument(4, 1e-5) if centered else node.argument(3)
        shape = NormShape(
            known_dims(source), float(_FLOAT32_EPS if eps is None else eps), centered, affine[0] is not None,
            len(affine) > 1 and affine[1] is not None, norm.steps,
        )  # fmt: skip
        function = emitter.builder.add_func(norm_function(shape, self.target), "norm")
        operands = [source, *(self._value(p.fx) for p in affine if p is not None)]
        output = relax.TensorType(list(source.ty.shape), output_dtype(norm.steps))
        return emitter(relax.call_tir(function, operands, output))

    def _group_norm(self, emitter: Emitter, norm: Norm) -> Any:
        node = norm.node
        affine = [node.operand(i) for i in (2, 3)]
        source = self._value(node.fx.all_input_nodes[0])
        weight, bias = (p is not None for p in affine)
        shape = GroupNormShape(known_dims(source), node.argument(1), node.argument(4), weight, bias, norm.steps)
        function = emitter.builder.add_func(group_norm_function(shape, self.target), "group_norm")
        operands = [source, *(self._value(p.fx) for p in affine if p is not None)]
        output = relax.TensorType(list(source.ty.shape), output_dtype(norm.steps))
        return emitter(relax.call_tir(function, operands, output))

    def _transpose(self, emitter: Emitter, node: Node) -> Any:
        order = order_of(node)
        if order is None:
            return None
        source, kind = self._value(node.fx.all_input_nodes[0]), str(node.dtype).removeprefix("torch.")
        if not takes_transpose(known_dims(source), order, kind, self.target):
            return None
        function = transpose_function(known_dims(source), order, kind, self.target)
        result = [source.ty.shape[d] for d in order]
        made = emitter.builder.add_func(function, "transpose")
        return emitter(relax.call_tir(made, [source], relax.TensorType(result, kind)))

    def _quantize(self, emitter: Emitter, node: Node, step: Requantize) -> Any:
        read, steps = node.fx.all_input_nodes[0], (step,)
        if read in self._merged:
            scaled = Node(read, node.graph)
            read, steps = read.all_input_nodes[0], (own_step(scaled), step)  # type: ignore[assignment]  # it has one
        source = self._value(read)
        function = emitter.builder.add_func(quantize_function(known_dims(source), steps, self.target), "quantize")
        return emitter(relax.call_tir(function, [source], relax.TensorType(list(source.ty.shape), "uint8")))


_FLOAT32_EPS = 1.1920928955078125e-07  # what rms_norm adds where no eps is given
