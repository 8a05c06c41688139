"""Calls of own kernels for ops without weights of their own region: attention, norms, quantizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import relax

from mcc import ops
from mcc.backends.cpu.fuse import requantize_step
from mcc.backends.cpu.kernels.attention import attention_function, attention_shape
from mcc.backends.cpu.kernels.concatenate import SHORTEST_RUN, Part, concatenate_function, run_of
from mcc.backends.cpu.kernels.norm import NormShape, norm_function
from mcc.backends.cpu.kernels.quantize import quantize_function
from mcc.backends.cpu.kernels.recurrent import NARROWEST, RecurrentShape, recurrent_function
from mcc.backends.relax.emitter import known_dims, rank, static
from mcc.errors import BackendError
from mcc.graph import Node
from mcc.ops import OPS
from mcc.text import located_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from mcc.backends.kernel import Requantize
    from mcc.backends.relax.emitter import Emitter
    from mcc.graph import Graph
    from mcc.target import Target

RECURRENT = (OPS["mcc.lstm"], OPS["mcc.gru"])
NORMS = (OPS["layer_norm"], OPS["rms_norm"])


def norms_before_quantizers(graph: Graph, target: Target) -> set[fx.Node]:
    """Norms that the quantizer behind them takes in: nothing else reads their floats."""
    found = set()
    for node in graph.nodes:
        source = node.operand(0) if node.op is ops.QUANTIZE else None
        if source is None or requantize_step(node) is None or not takes_norm(source, target):
            continue
        if len(source.fx.users) == 1:
            found.add(source.fx)
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
    """Whether the concatenation kernel takes this node: float32 or codes, runs of some elements in every input."""
    kind = str(node.dtype).removeprefix("torch.")
    rank = len(node.shape)
    dim = node.argument(1, 0) % max(rank, 1)
    sources = _concatenated(node)
    if kind not in ("float32", "uint8") or any(s.dtype != node.dtype or len(s.shape) != rank for s in sources):
        return False
    runs = [run_of(Part(s.shape), dim) for s in sources]
    return all(run is not None and run >= SHORTEST_RUN for run in runs)


def takes_norm(node: Node, target: Target) -> bool:
    """Whether the norm kernel takes this node: float32, over a fixed last dim of at least a vector."""
    if node.op not in NORMS or str(node.dtype) != "torch.float32" or len(node.argument(1)) != 1:
        return False
    affine = (node.operand(i) for i in (2, 3))
    plain = all(p is None or str(p.dtype) == "torch.float32" for p in affine)
    width = node.shape[-1]
    return plain and isinstance(width, int) and width >= target.vector_lanes


class Unweighted:
    """Emits these calls.

    Args:
        target: of the kernels.
        value: the relax value of a node.
        merged: norms that a quantizer takes in, and images that a concatenation enlarges.
        sizes: the dims of a node as relax has them.
    """

    def __init__(
        self, target: Target, value: Callable[[fx.Node], Any], merged: set[fx.Node], sizes: Callable[[Node], list[Any]]
    ) -> None:
        self.target = target
        self._sizes = sizes
        self._value = value
        self._merged = merged

    def call(self, emitter: Emitter, node: Node) -> Any:
        """The value of a node that has an own kernel here, or None."""
        if node.op is OPS["mcc.attention"]:
            return self._attention(emitter, node)
        if node.op is OPS["cat"] and takes_cat(node):
            return self._cat(emitter, node)
        if node.op in RECURRENT:
            return self._recurrent(emitter, node)
        if node.op in NORMS and takes_norm(node, self.target):
            return self._norm(emitter, node, None)
        if node.op is ops.QUANTIZE and (step := requantize_step(node)) is not None:
            source = node.operand(0)
            assert source is not None
            if source.fx in self._merged:
                return self._norm(emitter, source, step)
            return self._quantize(emitter, source, step)
        return None

    def _attention(self, emitter: Emitter, node: Node) -> Any:
        operands = [self._value(n.fx) for n in (node.operand(i) for i in range(4)) if n is not None]
        if len(operands) > 3:
            mask = operands[3]
            operands[3] = emitter(relax.op.reshape(mask, [*[1] * (4 - rank(mask)), *mask.ty.shape]))
        mask_dtype = str(operands[3].ty.dtype) if len(operands) > 3 else ""
        first = node.argument(6)
        shape = attention_shape(
            [known_dims(x) for x in operands], mask_dtype, first, causal=node.argument(4), scale=node.argument(5)
        )
        function = emitter.builder.add_func(attention_function(shape, self.target), "attention")
        query, value = operands[0].ty.shape, operands[2].ty.shape
        outer, inner = (query[1], query[2]) if first[0] == first[3] else (query[2], query[1])
        return emitter(
            relax.call_tir(function, operands, relax.TensorType([query[0], outer, inner, value[3]], "float32"))
        )

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
        states = 2 if node.op is OPS["mcc.lstm"] else 1
        operands = [node.operand(i) for i in range(states + 3)]
        read = [self._value(n.fx) for n in operands if n is not None]
        hidden = known_dims(read[1])[1]
        if not isinstance(hidden, int) or hidden < NARROWEST or any(str(x.ty.dtype) != "float32" for x in read):
            raise BackendError(
                f"{node.op} of {hidden} units of {read[0].ty.dtype}", node=located_text(node),
                remedy=f"use float32, and {NARROWEST} units or more",
            )  # fmt: skip
        dims = known_dims(read[0])
        shape = RecurrentShape(
            (dims[0], dims[1], int(dims[2])), dims[2] // hidden, hidden, operands[-1] is not None,
            node.argument(states + 3), node.argument(states + 4),
        )  # fmt: skip
        function = emitter.builder.add_func(recurrent_function(shape, self.target), node.op.name.removeprefix("mcc."))
        forms = [[*list(read[0].ty.shape)[:2], hidden], *(list(x.ty.shape) for x in read[1 : 1 + states])]
        return emitter(relax.call_tir(function, read, [relax.TensorType(form, "float32") for form in forms]))

    def _norm(self, emitter: Emitter, node: Node, step: Requantize | None) -> Any:
        centered = node.op is OPS["layer_norm"]
        affine = [node.operand(i) for i in ((2, 3) if centered else (2,))]
        source = self._value(node.fx.all_input_nodes[0])
        eps = node.argument(4, 1e-5) if centered else node.argument(3)
        shape = NormShape(
            known_dims(source), float(_FLOAT32_EPS if eps is None else eps), centered, affine[0] is not None,
            len(affine) > 1 and affine[1] is not None, () if step is None else (step,),
        )  # fmt: skip
        function = emitter.builder.add_func(norm_function(shape, self.target), "norm")
        operands = [source, *(self._value(p.fx) for p in affine if p is not None)]
        kind = "float32" if step is None else "uint8"
        return emitter(relax.call_tir(function, operands, relax.TensorType(list(source.ty.shape), kind)))

    def _quantize(self, emitter: Emitter, node: Node, step: Requantize) -> Any:
        source = self._value(node.fx)
        function = emitter.builder.add_func(quantize_function(known_dims(source), step, self.target), "quantize")
        return emitter(relax.call_tir(function, [source], relax.TensorType(list(source.ty.shape), "uint8")))


_FLOAT32_EPS = 1.1920928955078125e-07  # what rms_norm adds where no eps is given
