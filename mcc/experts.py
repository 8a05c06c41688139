"""Layers of experts: each row is multiplied by the matrix of its expert, as mixtures of experts have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


@torch.library.custom_op("mcc::grouped_matmul", mutates_args=())
def grouped_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows times the matrix of their group, [rows, outputs].

    Shazeer et al.: Outrageously large neural networks: the sparsely-gated mixture-of-experts layer. ICLR 2017.

    Args:
        rows: [rows, inputs], those of a group next to one another.
        weights: [groups, inputs, outputs].
        ends: int32 [groups], where the rows of each group end: a row's group is the number of ends before it. Rows of
            no group give zeros.
    """
    results = rows.new_zeros(rows.shape[0], weights.shape[2])
    for members, weight in zip(_members(rows, ends), weights, strict=True):
        results[members] = rows[members] @ weight
    return results


def _members(rows: Tensor, ends: Tensor) -> Iterator[Tensor]:
    """Which rows belong to each group."""
    owners = (ends <= torch.arange(len(rows))[:, None]).sum(1)
    return (owners == group for group in range(len(ends)))


@grouped_matmul.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    del ends
    return rows.new_empty(rows.shape[0], weights.shape[2])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: object) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    of_rows, of_weights = torch.zeros_like(rows), torch.zeros_like(weights)
    for group, members in enumerate(_members(rows, ends)):
        of_rows[members] = gradient[members] @ weights[group].T
        of_weights[group] = rows[members].T @ gradient[members]
    return of_rows, of_weights, None


grouped_matmul.register_autograd(_gradients, setup_context=_remember)
