"""Quantization of a decoder's key-value cache: the graph takes and gives codes and scales instead of floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.attention_products import PRODUCTS
from mcc.errors import DataError, PassError, SpecError
from mcc.formats import SMALLEST_ROW
from mcc.graph import Graph, Node
from mcc.ops import OPS
from mcc.rewrite import Context, Lossy, Pass, Rewriter
from mcc.signature import drop_input, split_input, split_output
from mcc.token_formats import LIMITS, ZERO, quantize_tokens, token_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

CAT, _REPEAT = OPS["cat"], OPS["repeat_interleave.self_int"]
_PRODUCTS = (*PRODUCTS, OPS["baddbmm"])  # of attention that is spelled out
_ATTENDING = (ops.ATTENTION, *_PRODUCTS)

Codes = Callable[[Rewriter, Node], tuple[Node, Node]]
Values = Callable[[Rewriter, Node, Node], Node]


@dataclass(frozen=True)
class _Cache:
    """A value that the graph returns, to be given back to it at the next call.

    Attributes:
        kept: the value.
        past: the input it continues, or None where this graph makes the first of it.
        new: what is appended to that; `kept` itself where there is no past.
    """

    kept: Node
    past: Node | None
    new: Node


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Keep keys and values of the tokens before as codes, with a scale for each token and head.

        %keys_0: f32[1, 2, past, 16]
        %cat: f32[1, 2, past + 1, 16] = cat([%keys_0, %k], dim=2)
        return %y, %cat
    becomes
        %keys_0_codes: i8[1, 2, past, 16]
        %keys_0_scale: f32[1, 2, past, 1]
        %k_scale: f32[1, 2, 1, 1] = mcc.token_scales(%k, bits=8, groups=1)
        %k_codes: i8[1, 2, 1, 16] = mcc.quantize_tokens(%k, %k_scale, bits=8)
        %cat_codes: i8[1, 2, past + 1, 16] = cat([%keys_0_codes, %k_codes], dim=2)
        %cat_scale: f32[1, 2, past + 1, 1] = cat([%keys_0_scale, %k_scale], dim=2)
        %cat: f32[1, 2, past + 1, 16] = mcc.dequantize_tokens(%cat_codes, %cat_scale, bits=8)
        return %y, %cat_codes, %cat_scale

    Where the model takes or returns a tensor of the cache, the compiled one takes and returns a tuple (codes, scale);
    `encode_cache` makes such tuples of float caches. A cache is what a graph attends to and returns: an input with more
    tokens behind it, or, in the graph of a prompt, keys and values [batch, heads, tokens, size] that are no input's.
    Sheng et al.: FlexGen: high-throughput generative inference of large language models with a single GPU. ICML 2023
    (there in groups, of 4 bits).

    Attributes:
        bits: of a code, 8 or 4.
        group_size: elements of a head that share a scale; None for all of them.
    """

    bits: Literal[8, 4] = 8
    group_size: int | None = None

    guarantee = Lossy()
    changes_signature = True

    def __post_init__(self) -> None:
        if self.bits not in tuple(LIMITS):
            raise SpecError(f"quantize-kv-cache: bits={self.bits!r}", remedy="use 8 or 4")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise SpecError(f"quantize-kv-cache: group_size={self.group_size!r}", remedy="give a number of elements")

    def run(self, graph: Graph, context: Context) -> Graph:
        """Replace every cache."""
        caches = list(self._caches(graph, context))
        if not caches:
            raise PassError(
                f"{self}: the graph keeps no cache: {context.reasons}",
                remedy="capture the model with its cache: past keys and values as inputs, all of them as outputs",
            )
        for cache in caches:
            self._replace(graph, cache, self._codes, self._values)
            context.edited()
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The same caches, codes and values computed by plain ATen calls."""
        del after
        plain = before.copy()
        for cache in list(self._caches(plain, None)):
            self._replace(plain, cache, self._plain_codes, self._plain_values)
        return plain.clean()

    def convert_inputs(self, before: Graph, after: Graph, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's inputs with its caches encoded."""
        kept = {node.name for node in after.inputs}
        parts = (
            (value,) if node.name in kept else self.encode_cache(value)
            for node, value in zip(before.inputs, inputs, strict=True)
        )
        return tuple(value for part in parts for value in part)

    def encode_cache(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of float32 keys or values [batch, heads, tokens, size], as the compiled model takes them.

        Raises:
            DataError: they are of another type, or of a size that has no such codes.
        """
        if not isinstance(values, Tensor) or values.dtype is not torch.float32 or values.dim() == 0:
            raise DataError(f"{self}: a cache is a float32 tensor", remedy="convert it")
        if (reason := self._unfit(values.shape[-1])) is not None:
            raise DataError(f"{self}: {reason}", remedy="choose bits and group_size for that size")
        scale = token_scales(values, self.bits, self._groups(values))
        return quantize_tokens(values, scale, self.bits), scale

    def _groups(self, values: Node | Tensor) -> int:
        return 1 if self.group_size is None else int(values.shape[-1]) // self.group_size

    def _caches(self, graph: Graph, context: Context | None) -> Iterator[_Cache]:
        attended = {root.fx for node in graph.nodes if node.op in _ATTENDING for root in _attended(node)}
        asked = {query.fx for node in graph.nodes if node.op is ops.ATTENTION if (query := node.operand(0)) is not None}
        seen = set()
        for node in graph.output_nodes:
            if node.fx in seen:
                continue
            seen.add(node.fx)
            past = _continued(node)
            if node.fx not in attended or (past is None and (node.value.dim() != 4 or node.fx in asked)):
                continue
            reason = self._refusal(node, past)
            if reason is None:
                yield _Cache(node, past, node if past is None else Node(node.argument(0)[1], graph))
            elif context is not None:
                context.decline(node, reason)

    def _refusal(self, kept: Node, past: Node | None) -> str | None:
        """Why a cache is not taken, or None if it is."""
        size = kept.shape[-1]
        if kept.dtype is not torch.float32:
            return f"it is {str(kept.dtype).removeprefix('torch.')}, not float32"
        if not isinstance(size, int):
            return "the size of a head varies"
        if past is None and (given := _passed_on(kept)) is not None:
            return f"it holds %{given.name}, but not with more tokens behind it"
        if past is not None:
            if Node(kept.argument(0)[1], kept.graph) == past:
                return f"it is %{past.name} twice"
            readers = [user for user in past.users if user.op is not ops.SYM_SIZE and user != kept]
            if readers or past.is_output:
                return f"its past %{past.name} is read by {readers[0].op if readers else 'the output'} as well"
            if kept.argument(1, 0) % len(kept.shape) == len(kept.shape) - 1:
                return "it grows along its last dim, along which scales would run"
        return self._unfit(size)

    def _unfit(self, size: int) -> str | None:
        """Why rows of this size have no such codes, or None if they have."""
        if self.bits == 4 and size % 2:
            return f"{size} elements cannot lie two in a byte"
        if self.group_size is not None and size % self.group_size:
            return f"{size} elements cannot be cut into groups of {self.group_size}"
        return None

    def _replace(self, graph: Graph, cache: _Cache, codes_of: Codes, values_of: Values) -> None:
        kept, name = cache.kept, cache.kept.name
        if cache.past is None:
            place = Node(kept.fx.next, graph)
            codes, scale = codes_of(Rewriter(graph, place), kept)
        else:
            rewriter = Rewriter(graph, kept)
            new_codes, new_scale = codes_of(rewriter, cache.new)
            new_codes.rename(f"{cache.new.name}_codes")
            new_scale.rename(f"{cache.new.name}_scale")
            past_codes, past_scale = self._split(graph, cache.past)
            dim = kept.argument(1, 0)
            codes = rewriter.call(CAT, [past_codes, new_codes], dim)
            scale = rewriter.call(CAT, [past_scale, new_scale], dim)
            for reader in cache.past.users:
                if reader.op is ops.SYM_SIZE:
                    reader.fx.replace_input_with(cache.past.fx, past_codes.fx)
        split_output(graph, kept, (codes, scale))
        if cache.past is not None:
            values_of(rewriter, codes, scale).take_place_of(kept)
            drop_input(graph, cache.past, 2)
        codes.rename(f"{name}_codes")
        scale.rename(f"{name}_scale")

    def _split(self, graph: Graph, past: Node) -> list[Node]:
        with graph.computing_shapes():
            scale = token_scales(past.value, self.bits, self._groups(past))
            codes = quantize_tokens(past.value, scale, self.bits)
        return split_input(graph, past, {"codes": codes, "scale": scale})

    def _codes(self, rewriter: Rewriter, values: Node) -> tuple[Node, Node]:
        groups = self._groups(values)
        scale = rewriter.call(OPS["mcc.token_scales"], values, self.bits, groups)
        return rewriter.call(OPS["mcc.quantize_tokens"], values, scale, self.bits), scale

    def _values(self, rewriter: Rewriter, codes: Node, scale: Node) -> Node:
        return rewriter.call(OPS["mcc.dequantize_tokens"], codes, scale, self.bits)

    def _plain_codes(self, rewriter: Rewriter, values: Node) -> tuple[Node, Node]:
        limit, size, groups = LIMITS[self.bits], int(values.shape[-1]), self._groups(values)

        def scales(x: Tensor) -> Tensor:
            largest = [part.abs().amax(-1) for part in x.chunk(groups, -1)]
            return torch.stack(largest, -1).clamp_min(SMALLEST_ROW) / limit

        def codes(x: Tensor, scale: Tensor) -> Tensor:
            rounded = torch.round(x / scale.repeat_interleave(size // groups, -1))
            if self.bits == 8:
                return rounded.to(torch.int8)
            stored = rounded + ZERO
            return (stored[..., : size // 2] + 16 * stored[..., size // 2 :]).to(torch.uint8)

        scale = rewriter.insert(scales, values)
        return rewriter.insert(codes, values, scale), scale

    def _plain_values(self, rewriter: Rewriter, codes: Node, scale: Node) -> Node:
        groups = int(scale.shape[-1])

        def values(codes: Tensor, scale: Tensor) -> Tensor:
            numbers = codes.to(torch.float32)
            if self.bits != 8:
                high = torch.floor(numbers / 16)
                numbers = torch.cat((numbers - 16 * high, high), -1) - ZERO
            return numbers * scale.repeat_interleave(numbers.shape[-1] // groups, -1)

        return rewriter.insert(values, codes, scale)


def _continued(node: Node) -> Node | None:
    """The input that a value is, with more behind it; or None."""
    parts: list[fx.Node] = node.argument(0) if node.op is CAT else []
    return Node(parts[0], node.graph) if len(parts) == 2 and parts[0].op == "placeholder" else None


def _attended(attention: Node) -> Iterator[Node]:
    """Keys and values of an attention, and what they are views of, rows as they are or transposed."""
    for position in (1, 2):
        node = attention.operand(position)
        sizes = (
            () if node is None else tuple(map(str, node.shape[-2:] if attention.op in _PRODUCTS else node.shape[-1:]))
        )
        while node is not None and node.op is not None:
            if str(node.shape[-1]) in sizes:
                yield node
            node = node.operand(0) if node.op.family == "move" or node.op is _REPEAT else None


def _passed_on(kept: Node) -> Node | None:
    """A float input that goes into a value without being computed with, such as a cache that rolls; or None."""
    queue, seen = [kept.fx], set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and node.meta["val"].is_floating_point():
            return Node(node, kept.graph)
        row = ops.lookup(node.target) if node.op == "call_function" else None
        if row is not None and row.family in ("move", "cut", "index", "along"):
            queue += node.all_input_nodes
    return None
