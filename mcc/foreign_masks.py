"""Masks of other tools: a float weight times a stored tensor of zeros and ones, as torch.nn.utils.prune leaves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcc import ops

if TYPE_CHECKING:
    from mcc.graph import Graph, Node


def recognize_masks(graph: Graph) -> None:
    """Make such products the masks that passes and kernels know: the weight first, the mask bool, under its name."""
    for node in graph.nodes:
        sides = (node.operand(0), node.operand(1)) if node.op is ops.MUL else (None, None)
        weight, mask = sides if _is_mask(sides[1], sides[0]) else sides[::-1]
        if weight is None or mask is None or not _is_mask(mask, weight) or not _only_weights_of_layers(node):
            continue
        graph.set_tensor(str(mask.fx.target), mask.tensor.detach().bool())
        mask.fx.meta["val"] = graph.fake_mode.from_tensor(mask.tensor, static_shapes=True)
        node.fx.args = (weight.fx, mask.fx)
    graph.module.recompile()


def _is_mask(mask: Node | None, weight: Node | None) -> bool:
    if mask is None or weight is None or not (mask.is_parameter and weight.is_parameter):
        return False
    values = mask.tensor
    if isinstance(values, torch.nn.Parameter) or values.shape != weight.tensor.shape:
        return False
    return weight.tensor.is_floating_point() and bool(((values == 0) | (values == 1)).all()) and len(mask.users) == 1


def _only_weights_of_layers(node: Node) -> bool:
    return bool(node.users) and all(
        user.op in ops.LAYERS and user.weight_operand == node and user.operand(0) != node for user in node.users
    )
