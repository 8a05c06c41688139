"""Weights as codes: scales and zero points, and the quantizers of layers in a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import PassError, SpecError
from mcc.formats import nearest
from mcc.graph import Graph, Node, identifier
from mcc.rewrite import Context, Rewriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mcc.rewrite import Pass

ROUNDED = "its weight is rounded to bfloat16"
QUANTIZERS = (ops.FAKE_QUANTIZE, ops.FAKE_QUANTIZE_PER_TOKEN, ops.FAKE_CODEBOOK)
GROUP_STEP = 32  # whole words of every width
MANY_CODES = 63
MIDPOINT = -0.5  # the zero point where codes stand for (code + 1/2) * scale


def check_group_size(step: str, group_size: int | None) -> None:
    """Raise a SpecError where no kernel reads groups of this size."""
    if group_size is not None and (
        not isinstance(group_size, int) or group_size < GROUP_STEP or group_size % GROUP_STEP
    ):
        raise SpecError(f"{step}: group_size={group_size!r}", remedy=f"use a multiple of {GROUP_STEP}, or None")


def ragged(node: Node, group_size: int | None) -> str | None:
    """Why a linear layer's inputs cannot be cut into groups, or None if they can."""
    weight = node.operand(1)
    assert weight is not None
    inputs = int(weight.shape[1])
    return f"its {inputs} inputs are no multiple of {group_size}" if group_size and inputs % group_size else None


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code of a weight in groups."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def channel_scales(weight: Tensor, axis: int, codes: tuple[int, int]) -> Tensor:
    """Symmetric scales for codes from the least to the largest of `codes`, float32 [weight.shape[axis]].

    With many codes the largest |w| of a channel gets the largest; with few the scale has the least squared error.
    """
    limit = codes[1]
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], 1, -1)
    largest = rows.abs().amax((1, 2))
    # a channel too small for a float32 scale counts as zero
    full = torch.where(largest > torch.finfo(torch.float32).tiny * limit, largest / limit, 1.0)
    if limit >= MANY_CODES:
        return full
    scale, _ = _least_error(rows, full[:, None], codes, 0.0, torch.float32)
    return scale[:, 0]


def group_parameters(
    weight: Tensor,
    groups: int,
    codes: tuple[int, int],
    *,
    symmetric: bool,
    midpoints: bool = False,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group of a row's inputs, for the least squared error of the rounded weights.

    Args:
        weight: [out, in].
        groups: of a row, all of one size.
        codes: the least and the largest.
        symmetric: whether all zero points are alike.
        midpoints: whether that zero point is `MIDPOINT`; with two codes it has to be.
        importance: of squared errors, [in]; None where all inputs count alike.

    Returns:
        Scales [out, groups], float16, or float32 where they are too small or too large for that, and zero points: int8
        [out, groups], or [] where symmetric, float16 for midpoints.
    """
    values = weight.detach().float().reshape(len(weight), groups, -1)
    low, high = codes
    least, most = values.amin(-1).clamp(max=0.0), values.amax(-1).clamp(min=0.0)
    fixed = MIDPOINT if midpoints else 0.0
    full = torch.maximum(-least, most) / (high - fixed) if symmetric else (most - least) / (high - low)
    full = torch.where(full > torch.finfo(torch.float32).tiny, full, 1.0)
    kind = scale_dtype(full, _shrinks(high)[-1])
    counts = None if importance is None else importance.float().reshape(groups, -1)
    if high - low == 1:  # one value and its negative: the mean of |w|, as in XNOR-Net, Rastegari et al., ECCV 2016
        shares = torch.ones_like(values) if counts is None else counts.expand_as(values)
        total = shares.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        scale = 2 * (values.abs() * shares).sum(-1) / total
        scale, zero = torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
    else:
        scale, zero = _least_error(values, full, codes, fixed if symmetric else least, kind, counts)
    alike = torch.tensor(fixed, dtype=torch.float16 if midpoints else torch.int8)
    return scale.to(kind), alike if symmetric else zero.to(torch.int8)


def scale_dtype(full: Tensor, smallest_shrink: float) -> torch.dtype:
    """Float16 where it holds positive scales and those shrunken by as much as that, all as normal numbers."""
    normal = torch.finfo(torch.float16)
    fits = bool((full * smallest_shrink > normal.tiny).all() and (full < normal.max).all())
    return torch.float16 if fits else torch.float32


def power_of_two(values: Tensor, scale: Tensor, codes: tuple[int, int]) -> Tensor:
    """Of the two powers of two about each scale, the one with the least squared error.

    Args:
        values: what is rounded, [..., size].
        scale: of symmetric codes, [...].
        codes: the least and the largest.
    """
    below = torch.exp2(torch.floor(torch.log2(scale.float())))

    def error(step: Tensor) -> Tensor:
        in_steps = values.float() / step[..., None]
        rounded = torch.round(in_steps).clamp(*codes)
        return ((rounded - in_steps) * step[..., None]).square().sum(-1)

    return torch.where(error(below) < error(2 * below), below, 2 * below).to(scale.dtype)


def _shrinks(high: int) -> list[float]:
    """Scales to try beside that of the whole range, largest first; with codes up to 1 they leave outliers out."""
    found: list[float] = (torch.logspace(0, -0.7, 33) if high > 1 else torch.logspace(0, -1.7, 81)).tolist()
    return found


def _least_error(
    values: Tensor,
    full: Tensor,
    codes: tuple[int, int],
    least: Tensor | float,
    kind: torch.dtype,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of scales shrunken from `full` those with the least squared error, and their zero points.

    Args:
        values: [rows, groups, elements].
        full: scales of the whole range, [rows, groups].
        codes: the least and the largest.
        least: what the least code stands for at the full scale, [rows, groups]; or the zero point of all.
        kind: what scales are stored as.
        importance: of squared errors, [groups, elements].
    """
    low, high = codes
    best_error, best, zeros = torch.full_like(full, torch.inf), full, torch.zeros_like(full)
    in_steps = values / full[..., None]  # squares of the values themselves may overflow
    for shrink in _shrinks(high):
        scale = (full * shrink).to(kind).float()
        if isinstance(least, Tensor):
            zero = (low - least * shrink / scale).round().clamp(low, high)
        else:
            zero = torch.full_like(scale, least)
        step = (scale / full)[..., None]
        rounded = nearest(in_steps / step, zero[..., None])
        squares = ((rounded.clamp(low, high) - zero[..., None]) * step - in_steps).square()
        error = (squares if importance is None else squares * importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best, zeros = torch.where(better, scale, best), torch.where(better, zero, zeros)
    return best, zeros


def multiplying(graph: Graph) -> list[Node]:
    """The calls that multiply: layers, and others such as attention, which passes decline with a reason."""
    return [n for n in graph.nodes if n.op is not None and (n.op in ops.LAYERS or n.op.macs(n.fx))]


def reader_in_float(node: Node) -> Node | None:
    """What reads a linear layer's weight besides linear layers, such as an embedding that is tied to it; or None."""
    top = node.weight_operand
    assert top is not None
    others = (ops.LINEAR, *QUANTIZERS)
    return next((user for user in top.users if user.op not in others), None)


def linear_layers_taken(
    step: Pass, graph: Graph, context: Context, refusal: Callable[[Node], str | None]
) -> list[Node]:
    """The linear layers with a float weight that `refusal` gives no reason against, for passes that quantize those.

    Raises:
        PassError: there is none, with all reasons.
    """
    failure = PassError(
        f"{step}: no layer can be quantized",
        remedy="give a group_size that divides their inputs, or None for one group; or leave the pass out",
    )
    return layers_taken(multiplying(graph), context, lambda node: _not_plain_linear(node) or refusal(node), failure)


def _not_plain_linear(node: Node) -> str | None:
    """Why this is no linear layer with a float weight, or None if it is one."""
    return f"{node.op} is not linear" if node.op is not ops.LINEAR else not_in_float(node)


def not_in_float(node: Node) -> str | None:
    """Why a layer has no stored float32 weight, or None if it has one."""
    expression = weight_expression(node.weight_operand)
    if expression is None:
        return "its weight is computed"
    if node.dtype is not torch.float32:
        return f"it computes in {str(node.dtype).removeprefix('torch.')}, not float32"
    if expression.quantizer is not None or expression.sparse is not None:
        return "its weight is already quantized or encoded"
    if expression.rounded is not None:
        return ROUNDED
    return None


def layers_taken(
    nodes: Iterable[Node], context: Context, refusal: Callable[[Node], str | None], failure: PassError
) -> list[Node]:
    """As `nodes_taken`.

    Raises:
        PassError: `failure` with all reasons behind its text, where none is left.
    """
    taken = nodes_taken(nodes, context, refusal)
    if not taken:
        raise PassError(f"{failure.message}: {context.reasons}", remedy=failure.remedy)
    return taken


def nodes_taken(nodes: Iterable[Node], context: Context, refusal: Callable[[Node], str | None]) -> list[Node]:
    """The nodes that `refusal` gives no reason against; the others are declined with theirs."""
    taken = []
    for node in nodes:
        reason = refusal(node)
        if reason is None:
            taken.append(node)
        else:
            context.decline(node, reason)
    return taken


def layer_weight(node: Node) -> tuple[str, Tensor]:
    """The name and the values of a layer's weight, masked ones zero.

    Raises:
        PassError: a value is not finite.
    """
    expression = weight_expression(node.weight_operand)
    assert expression is not None
    if not expression.root.tensor.isfinite().all():
        raise PassError(
            f"the weight of {node.layer} is infinite or not a number", remedy="check the checkpoint it was loaded from"
        )
    return str(expression.root.fx.target), expression.values


def insert_quantizer(
    node: Node, name: str, parameters: Callable[[], tuple[Tensor, Tensor]], axis: int, codes: tuple[int, int]
) -> None:
    """Quantize a layer's weight, or let it read the quantizer that another layer with the same weight has."""
    top = node.weight_operand
    assert top is not None
    shared = next((u for u in top.users if u.op is ops.FAKE_QUANTIZE), None)
    if shared is not None:
        if node.fx < shared.fx:  # an embedding comes long before the layer it is tied to
            for moved in (*shared.fx.all_input_nodes, shared.fx):
                if node.fx < moved:
                    node.fx.prepend(moved)
        node.fx.replace_input_with(top.fx, shared.fx)
        return
    scale, zero_point = parameters()
    rewriter = Rewriter(node.graph, node)
    made = rewriter.call(
        ops.FAKE_QUANTIZE, top, rewriter.read(f"{name}_scale", scale),
        rewriter.read(f"{name}_zero_point", zero_point), axis, *codes,
    )  # fmt: skip
    made.rename(f"{identifier(name)}_quantized")
    node.fx.replace_input_with(top.fx, made.fx)


def new_quantizers(before: Graph, after: Graph) -> list[Node]:
    """The fake-quantizers that a pass put into a graph."""
    known = {node.name for node in before.nodes}
    return [node for node in after.nodes if node.op in QUANTIZERS and node.name not in known]


def without_quantizers(graph: Graph) -> Graph:
    """A copy in which what read a fake-quantizer reads what that reads."""
    plain = graph.copy()
    for node in plain.nodes:
        source = node.operand(0)
        if node.op in QUANTIZERS and source is not None:
            node.fx.replace_all_uses_with(source.fx)
    return plain.clean()


def quantizer_tensors(node: Node) -> tuple[Tensor, Tensor, int, int]:
    """Scale, zero point, and the least and largest code of a fake_quantize node."""
    scale, zero_point = node.operand(1), node.operand(2)
    assert scale is not None
    assert zero_point is not None
    return scale.tensor, zero_point.tensor, node.argument(4), node.argument(5)


def weights_rounded(before: Graph, after: Graph) -> Graph:
    """The graph before, reading the weights that a pass quantized rounded in their tensors."""
    rounded = before.copy()
    for node in new_quantizers(before, after):
        round_weight(rounded, node)
    return rounded.clean()


def round_weight(graph: Graph, quantizer: Node) -> None:
    """Give the readers of the quantized weight a rounded copy; others of a tied weight keep the weight itself."""
    expression, top = weight_expression(quantizer), quantizer.operand(0)
    assert expression is not None
    assert top is not None
    scale, zero, low, high = quantizer_tensors(quantizer)
    weight = expression.values
    if scale.dim() == 2:  # groups of inputs
        cut, shape = weight.reshape(*scale.shape, -1), [*scale.shape, 1]
    else:
        cut, shape = weight, [-1 if i == quantizer.argument(3) else 1 for i in range(weight.dim())]
    step, zero = scale.float().reshape(shape), zero if zero.dim() == 0 else zero.reshape(shape)
    codes = nearest(cut / step, zero).clamp(low, high)
    rounded_weight = ((codes - zero) * step).reshape(weight.shape)
    readers = [graph.node(user.name) for user in quantizer.users]
    order = {n: i for i, n in enumerate(graph.module.graph.nodes)}
    rewriter = Rewriter(graph, min(readers, key=lambda n: order[n.fx]))
    made = rewriter.read(f"{expression.root.fx.target}_rounded", rounded_weight)
    for reader in readers:
        reader.fx.replace_input_with(graph.node(top.name).fx, made.fx)
