"""Calls of the attention kernels: which of them takes an attention, and what it reads as codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tvm import relax

from mcc import ops
from mcc.attention import LARGEST_CODE
from mcc.backends.cpu.integerize import quantized_source
from mcc.backends.cpu.kernels.attention import TokenCodes, attention_function, attention_shape
from mcc.backends.cpu.kernels.attention_step import attention_step_function
from mcc.backends.cpu.kernels.attention_tiles import attention_int8_function
from mcc.backends.cpu.kernels.quads import QUAD
from mcc.backends.cpu.tokens import reads_codes
from mcc.backends.relax.emitter import known_dims, rank
from mcc.ops import OPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from mcc.backends.relax.emitter import Emitter
    from mcc.graph import Graph, Node
    from mcc.target import Target

ATTENTION = OPS["mcc.attention"]
_KERNELS = {
    "attention": attention_function, "attention_step": attention_step_function,
    "attention_int8": attention_int8_function,
}  # fmt: skip
# whose products with differences of codes int32 holds, whatever these are; more keys of a size that varies are taken,
# which exceeds int32 only where values lie at the end of their range on average
MOST_KEYS = (2**31 - 1) // (LARGEST_CODE * 255)
_CAUSAL, _SCALE, _TOKENS_FIRST, _LIMIT = 4, 5, 6, 7  # positions of arguments


def decodes_before_attention(graph: Graph, target: Target) -> set[fx.Node]:
    """Decodes that the attention behind them reads as codes: nothing else reads their floats."""
    found = set()
    for node in graph.nodes:
        users = [] if node.is_output else node.users
        if not users or any(user.op is not ATTENTION for user in users):
            continue
        cached = node.op is ops.DEQUANTIZE_TOKENS and reads_codes(node, target)
        if (cached and all(user.operand(0) != node for user in users)) or (
            node.op is ops.DEQUANTIZE and all(coded(user, target) for user in users)
        ):
            found.add(node.fx)
    return found


def coded(node: Node, target: Target) -> bool:
    """Whether the kernel of codes takes an attention; where it does not, `refusal` says why."""
    if not node.argument(_LIMIT, 0) or _refusal(node, target) is not None:
        return False
    operands = (node.operand(i) for i in range(3))
    return all(x is not None and quantized_source(x)[1] is not None for x in operands)


def refusal(node: Node, target: Target) -> str:
    """Why an attention that rounds its probabilities does not multiply codes; empty where it does, or rounds none."""
    if not node.argument(_LIMIT, 0) or coded(node, target):
        return ""
    return f"computed in float between its quantizers: {_refusal(node, target) or 'its operands are no uint8 codes'}"


def _refusal(node: Node, target: Target) -> str | None:
    query, key = node.operand(0), node.operand(1)
    assert query is not None
    assert key is not None
    keys = key.shape[1 if node.argument(_TOKENS_FIRST)[1] else 2]
    if not target.exact_dot4:
        return f"{target} has no instruction that adds products of codes exactly"
    if int(query.shape[3]) % QUAD:
        return f"its depth {query.shape[3]} is no multiple of {QUAD}"
    if node.argument(_LIMIT, 0) > LARGEST_CODE or (isinstance(keys, int) and keys > MOST_KEYS):
        return "its sums would be too large"
    return "a single query reads each key once" if _one_row(node) else None


def _one_row(node: Node) -> bool:
    query = node.operand(0)
    assert query is not None
    rows = query.shape[1 if node.argument(_TOKENS_FIRST)[0] else 2]
    return isinstance(rows, int) and rows == 1


def kernel_name(node: Node, target: Target) -> str:
    """The kernel of an attention, for the report."""
    if coded(node, target):
        return "attention_int8"
    return "attention_step" if _step(node, target) else "attention"


def _step(node: Node, target: Target) -> bool:
    """Whether one query of each head sees all keys, in whole vectors."""
    query = node.operand(0)
    assert query is not None
    return _one_row(node) and not node.argument(_CAUSAL) and int(query.shape[3]) % target.vector_lanes == 0


@dataclass(frozen=True)
class Attending:
    """Emits these calls.

    Attributes:
        target: of the kernels.
        value: the relax value of a node.
        merged: decodes that kernels take in.
    """

    target: Target
    value: Callable[[fx.Node], Any]
    merged: set[fx.Node]

    def call(self, emitter: Emitter, node: Node) -> Any:
        """The value of an attention."""
        codes = coded(node, self.target)
        parts = [self._read(x, codes=codes) for x in map(node.operand, range(3)) if x is not None]
        operands = [x for given, _ in parts for x in given]
        dims = [_logical(given[0], form) for given, form in parts]
        mask, mask_dtype = node.operand(3), ""
        if mask is not None:
            given = self.value(mask.fx)
            operands.append(emitter(relax.op.reshape(given, [*[1] * (4 - rank(given)), *given.ty.shape])))
            dims.append(known_dims(operands[-1]))
            mask_dtype = str(given.ty.dtype)
        first = node.argument(_TOKENS_FIRST)
        shape = attention_shape(
            dims, mask_dtype, first, causal=node.argument(_CAUSAL), scale=node.argument(_SCALE),
            codes=(parts[1][1], parts[2][1]),
        )  # fmt: skip
        shape = replace(shape, limit=node.argument(_LIMIT, 0))
        name = kernel_name(node, self.target)
        added = emitter.builder.add_func(_KERNELS[name](shape, self.target), name)
        sizes = operands[0].ty.shape
        outer, inner = (sizes[1], sizes[2]) if first[0] == first[3] else (sizes[2], sizes[1])
        output = relax.TensorType([sizes[0], outer, inner, shape.width], "float32")
        return emitter(relax.call_tir(added, operands, output))

    def stored_text(self, node: Node) -> str:
        """How what an attention reads is stored where it is no floats, for the report."""
        if coded(node, self.target):
            return "int8 queries, keys, values, probabilities"
        read = [x for x in (node.operand(i) for i in (1, 2)) if x is not None and x.op is ops.DEQUANTIZE_TOKENS]
        decodes = [x for x in read if x.fx in self.merged]
        return f"int{decodes[0].argument(2)} keys, values" if decodes else ""

    def _read(self, source: Node, *, codes: bool) -> tuple[list[Any], TokenCodes | None]:
        """What a kernel reads of an operand: codes, scale and zero point, floats, or codes and scales of tokens."""
        if not codes and source.fx not in self.merged:
            return [self.value(source.fx)], None
        stored = [x for x in map(source.operand, range(3)) if x is not None]
        form = None if codes else TokenCodes(source.argument(2), int(stored[1].shape[-1]))
        return [self.value(x.fx) for x in stored], form


def _logical(data: Any, codes: TokenCodes | None) -> tuple[Any, ...]:
    *outer, size = known_dims(data)
    return (*outer, size * 2 if codes is not None and codes.bits == 4 else size)
