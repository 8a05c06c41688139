"""Quantizers of other tools: of ONNX files and PyTorch's export flow, with codes between quantize and dequantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc import ops
from mcc.constants import same_tensor, stored_value, varying
from mcc.formats import dequantize
from mcc.graph import Node, identifier, module_path
from mcc.ops import OPS
from mcc.products import products_as_layers, turned

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.graph import Graph

# values of codes go through these as codes do
_MOVES = {
    *(row for row in OPS.values() if row.family == "move"),
    *(OPS[name] for name in ("slice.Tensor", "select.int", "max_pool1d", "max_pool2d", "max_pool3d")),
}
_SUFFIXES = ("_quantized", "_codes", "_packed", "_qweight")
WIDTHS = (2, 3, 4, 8)  # bits of codes of weights
UNSIGNED = 8  # bits of codes of activations that kernels have unsigned


def recognize_quantizers(graph: Graph) -> None:
    """Make them the quantizers that passes and kernels know.

        %c = quantize(%x, @s, @z, None, -128, 127, int8); %v = dequantize(%c, @s, @z)
    becomes
        %x_quantized = mcc.fake_quantize(%x, @s, @z_unsigned, axis=None, low=0, high=255)
    for codes of activations are unsigned here, and
        %w = dequantize(@codes, @s, @z, 0)
    where a layer reads it
        %w_quantized = mcc.fake_quantize(@weight, @s, @z, axis=0, low=-128, high=127)
    with the values of the codes as @weight, so that it trains, prunes and is stored as what `quantize` gives. Codes
    that are moved or pooled between quantize and dequantize are so as values. What else reads codes goes on doing so.
    """
    for node in graph.nodes:
        if (spell := _SPELLINGS.get(str(node.fx.target))) is not None:
            spell(node)
    if not any(is_foreign(node) for node in graph.nodes):
        return
    products_as_layers(graph)
    inputs = varying(graph)
    for node in graph.nodes:
        if node.op is ops.QUANTIZE and node.fx in inputs:
            _recognize_activation(node)
    for node in graph.nodes:
        if node.op is ops.DEQUANTIZE and node.fx not in inputs:
            _recognize_weights(node)
    graph.clean().repropagate()


def _spell_quantize(node: Node) -> None:
    by_channel = "per_channel" in str(node.fx.target)
    low, high, dtype = (node.argument(i + by_channel) for i in (3, 4, 5))
    parameters = _stored_parameters(node)
    if parameters is not None:
        _call(node, ops.QUANTIZE, node.operand(0), *parameters, _axis(node), low, high, dtype).take_place_of(node)


def _spell_dequantize(node: Node) -> None:
    parameters = _stored_parameters(node)
    if parameters is not None and node.dtype is torch.float32:
        _call(node, ops.DEQUANTIZE, node.operand(0), *parameters, _axis(node)).take_place_of(node)


def _axis(node: Node) -> int | None:
    return int(node.argument(3)) % len(node.shape) if "per_channel" in str(node.fx.target) else None


_LIBRARY = "quantized_decomposed"
_SPELLINGS: dict[str, Callable[[Node], None]] = {
    f"{_LIBRARY}.{verb}_{kind}": spell
    for verb, spell in (("quantize", _spell_quantize), ("dequantize", _spell_dequantize))
    for kind in ("per_tensor.default", "per_tensor.tensor", "per_channel.default")
}


def _stored_parameters(node: Node) -> tuple[Node, Node] | None:
    """Nodes that read a scale, float32, and a zero point, int32, given as numbers or as stored tensors."""
    source = node.operand(0)
    read: list[Node] = []
    assert source is not None
    for place, part, dtype in ((1, "scale", torch.float32), (2, "zero_point", torch.int32)):
        given, stored = node.argument(place), node.operand(place)
        if stored is not None and not stored.is_parameter:
            return None
        if stored is not None and stored.dtype is dtype:
            read.append(stored)
            continue
        if stored is not None:
            value = stored.tensor.detach()
        else:
            value = torch.zeros(read[0].tensor.shape) if given is None else torch.as_tensor(given)
        read.append(_store(node, f"{source.name}_{part}", value.to(dtype)))
    return read[0], read[1]


def _call(before: Node, op: ops.Op, *args: object) -> Node:
    """A call whose fake value is that of the node it is made for, in front of it."""
    made = before.graph.call(before, op.target, *(a.fx if isinstance(a, Node) else a for a in args))
    made.meta["val"] = before.value
    return Node(made, before.graph)


def _store(before: Node, name: str, tensor: Tensor) -> Node:
    name = before.graph.free_name(name)
    before.graph.set_tensor(name, tensor)
    return before.graph.read(name, before)


def _recognize_activation(node: Node) -> None:
    """Replace a quantize, and each dequantize of its codes with the same scale."""
    ends: list[Node] = []
    x, scale, zero_point = (node.operand(i) for i in range(3))
    assert x is not None
    assert zero_point is not None
    if not (_fixed(node) and _ends(node, node, ends) and ends):
        return
    axis, low, high = (node.argument(i) for i in range(3, 6))
    if axis is None and low < 0 and high - low < 1 << UNSIGNED:
        zero_point = _store(node, f"{zero_point.fx.target}_unsigned", zero_point.tensor + (1 << (UNSIGNED - 1)))
        low, high = low + (1 << (UNSIGNED - 1)), high + (1 << (UNSIGNED - 1))
    if _has_values_of(x, scale, zero_point, (axis, low, high)):
        made = x
    else:
        made = _call(node, ops.FAKE_QUANTIZE, x, scale, zero_point, axis, low, high)
        made.rename(f"{x.name}_quantized")
    node.fx.replace_all_uses_with(made.fx)
    for end in ends:
        end.fx.replace_all_uses_with(end.fx.all_input_nodes[0])


def _has_values_of(x: Node, scale: Node | None, zero_point: Node, codes: tuple[int | None, int, int]) -> bool:
    """Whether a value is what this quantizer gives already, moved or pooled: it would change nothing."""
    while x.op in _MOVES and (source := x.operand(0)) is not None:
        x = source
    same = x.op is ops.FAKE_QUANTIZE and codes[0] is None and same_tensor(x.operand(1), scale)
    return same and same_tensor(x.operand(2), zero_point) and tuple(x.fx.args[3:]) == codes


def _fixed(node: Node) -> bool:
    """Whether a quantize or dequantize has a stored scale and zero point."""
    return all(operand is not None and operand.is_parameter for operand in (node.operand(1), node.operand(2)))


def _ends(node: Node, quantize: Node, ends: list[Node]) -> bool:
    """Whether all that becomes of the codes is that they are moved, and dequantized as they were quantized."""
    if node.is_output:
        return False
    for user in node.users:
        if user.op is ops.DEQUANTIZE:
            same = all(same_tensor(user.operand(i), quantize.operand(i)) for i in (1, 2))
            if not same or user.argument(3) != quantize.argument(3):
                return False
            ends.append(user)
        elif user.op not in _MOVES or quantize.argument(3) is not None or not _ends(user, quantize, ends):
            return False
    return True


def _recognize_weights(node: Node) -> None:
    """Let those that read stored codes' values read a weight of them, under a quantizer where they are layers.

    What reads their transpose does so too, with a weight that is transposed.
    """
    parts = (stored_value(node.graph, part) for part in map(node.operand, range(3)) if part is not None)
    codes, scale, zero_point = (part for part in parts if part is not None)
    axis = node.argument(3)
    for reader in node.users:
        if turned(reader) == node and scale.dim() < 2:
            stored = _Codes(codes.t().contiguous(), scale, zero_point, None if axis is None else 1 - axis)
            _read_weight(reader, stored, _name(node))
    if node.users:
        _read_weight(node, _Codes(codes, scale, zero_point, axis), _name(node))


@dataclass(frozen=True)
class _Codes:
    """What a dequantize reads."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None


def _read_weight(node: Node, stored: _Codes, name: str) -> None:
    """Put a stored weight, and a quantizer over it where a layer reads it, in the place of what gave its values."""
    graph = node.graph
    layer = next((u for u in node.users if u.op in (*ops.LAYERS, ops.EMBEDDING) and u.weight_operand == node), None)
    if not name:  # a frozen constant has its layer's
        name = "constant" if layer is None else f"{module_path(layer.fx) or layer.name}.weight"
    if any(n.op == "get_attr" and n.target == name for n in graph.module.graph.nodes if n.users):
        name = graph.free_name(name)
    elif graph.free_name(name) != name:
        graph.remove_tensor(name)  # the original, or packed codes
    values: Tensor = dequantize(stored.codes, stored.scale, stored.zero_point, stored.axis)
    graph.add_parameter(name, values)
    made, limits = graph.read(name, node), _limits(stored.codes)
    if layer is not None and limits is not None:
        shift, low, high = limits
        # blocks of zeros have a scale of zero
        steps, zeros = torch.where(stored.scale == 0, 1.0, stored.scale), stored.zero_point - shift
        axis = stored.axis
        if axis is None:  # kernels read a scale for each output
            axis = 1 if layer.op is ops.CONV_TRANSPOSE2D else 0
            steps, zeros = (t.expand(values.shape[axis]).contiguous() for t in (steps, zeros))
        read = _store(node, f"{name}_scale", steps), _store(node, f"{name}_zero_point", zeros)
        made = _call(node, ops.FAKE_QUANTIZE, made, *read, axis, low, high)
    made.take_place_of(node)
    if made.op is ops.FAKE_QUANTIZE:
        made.rename(f"{identifier(name)}_quantized")


def _name(node: Node) -> str:
    """The name of a float weight: that of its codes without what a tool appends; empty for a frozen constant."""
    source = node.operand(0)
    while source is not None and not source.is_parameter:
        source = source.operand(0)
    name = "constant" if source is None else str(source.fx.target)
    if name.rpartition(".")[2].startswith("_frozen_param"):
        return ""
    stem = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
    return stem if stem != name else f"{name}_values"


def _limits(codes: Tensor) -> tuple[int, int, int] | None:
    """What to subtract from codes so that they are signed, and the range of the fewest bits that holds them then.

    None where they have more than eight.
    """
    if codes.dtype not in (torch.uint8, torch.int8) or not codes.numel():
        return None
    least, most = int(codes.min()), int(codes.max())
    for bits in WIDTHS:
        half = 1 << (bits - 1)
        shift = half if codes.dtype is torch.uint8 else 0
        if least - shift >= -half and most - shift < half:
            return shift, -half, half - 1
    return None


def is_foreign(node: Node) -> bool:
    """Whether this is a quantize or dequantize that `recognize_quantizers` looks at."""
    return str(node.fx.target).startswith(f"{_LIBRARY}.") or node.op in (ops.QUANTIZE, ops.DEQUANTIZE)
