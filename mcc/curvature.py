"""The curvature of a layer's squared error by its weights, and changing weights so that others make up for it.

Hassibi, Stork: Second order derivatives for network pruning: optimal brain surgeon. NeurIPS 1992.
Frantar, Ashkboos, Hoefler, Alistarh: GPTQ. ICLR 2023. Frantar, Alistarh: SparseGPT. ICML 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc.errors import DataError, PassError
from mcc.statistics import run_in_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import fx

    from mcc.graph import Graph, Node
    from mcc.rewrite import Context, Pass

BLOCK = 128  # inputs whose errors are spread over the inputs behind them in one product


def hessian(inputs: Iterable[Tensor]) -> Tensor:
    """Mean of x x^T over all rows of a layer's inputs, float64 [in, in]: half the Hessian of its squared error."""
    total: Tensor | None = None
    count = 0
    for x in inputs:
        rows = x.reshape(-1, x.shape[-1]).double()
        total = rows.T @ rows if total is None else total + rows.T @ rows
        count += len(rows)
    assert total is not None
    return total / max(count, 1)


def layer_hessian(node: Node, width: int, arguments: list[list[Any]]) -> Tensor:
    """The Hessian of a linear layer from what calibration gives it.

    Args:
        node: the layer.
        width: its inputs.
        arguments: of each batch.

    Raises:
        DataError: a batch does not fit, or gives values that are not finite.
    """
    for i, (x, *_) in enumerate(arguments):
        if not isinstance(x, Tensor) or x.shape[-1] != width:
            given = x.shape[-1] if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"calibration batch {i} does not fit the graph: {node.layer} has {width} inputs, not {given}",
                remedy="give each batch as a tuple of the model's inputs",
            )
    curvature = hessian(x for x, *_ in arguments)
    if not curvature.isfinite().all():
        raise DataError(
            f"calibration: what {node.layer} reads is infinite or not a number",
            remedy="check the batches and the weights",
        )
    return curvature


def inverse_factor(curvature: Tensor, damping: float, step: Pass, node: Node) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32 [in, in].

    Args:
        curvature: the Hessian.
        damping: added to its diagonal, relative to the mean of that.
        step: the pass, for the error.
        node: the layer, for the error.

    Raises:
        PassError: the damped Hessian is singular.
    """
    diagonal = curvature.diagonal()
    dead = diagonal == 0  # inputs that were always zero
    damped = curvature + torch.diag(dead.double() + damping * diagonal.mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError, which its stubs do not export
        raise PassError(f"{step}: the Hessian of {node.layer} is singular", remedy="raise damping") from error
    return factor.float()


def layer_by_layer(
    graph: Graph, context: Context, label: str, layers: Iterable[Node], change: Callable[[Node, list[list[Any]]], None]
) -> None:
    """Change the weights of layers one after another, each told what the changed layers before it give.

    Args:
        graph: of the layers.
        context: of the pass, with calibration data; counts an edit and shows progress for each layer.
        label: for the progress display.
        layers: linear layers.
        change: gets a layer and its arguments for each batch, and changes its stored weight.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    assert context.data.calibration is not None
    by_call = {node.fx: node for node in layers}

    def before(node: fx.Node, arguments: list[list[Any]]) -> bool:
        if node not in by_call:
            return False
        change(by_call[node], arguments)
        context.edited()
        advance()
        return True

    with context.shown(label, len(by_call)) as advance:
        run_in_step(graph, context.data.calibration, before)


def compensated(weight: Tensor, inverse: Tensor, settle: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Settle the weights of one input after another; each change is made up for by the inputs behind it.

    Args:
        weight: [out, in].
        inverse: see `inverse_factor`.
        settle: from the weights as they are by then and the number of an input gives what that input's weights become,
            [out].
    """
    weight, done = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for i in range(start, end):
            done[:, i] = settle(weight, i)
            error = (weight[:, i] - done[:, i]) / inverse[i, i]
            weight[:, i:end] -= error[:, None] * inverse[i, i:end]
            errors[:, i - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return done
