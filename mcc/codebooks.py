"""Weights as codes of a table: each stands for a value, or for two neighbouring ones, times the scale of its group.

Codes are signed, so that they are packed and read as those of integers are: code -entries / 2 is the table's first row.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16  # vectors whose distances to all entries are held at once


def nearest_entries(vectors: Tensor, table: Tensor) -> Tensor:
    """Which entry each vector is nearest to.

    Args:
        vectors: [count, size].
        table: [entries, size]; where size is 1, in ascending order.

    Returns:
        int64 [count].
    """
    if table.shape[1] == 1:
        between = (table[1:, 0] + table[:-1, 0]) / 2
        return torch.bucketize(vectors[:, 0].contiguous(), between.contiguous())
    norms = (table * table).sum(1)
    found = [(norms - 2 * part @ table.T).argmin(1) for part in torch.split(vectors, CHUNK)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _in_scales(x: Tensor, scale: Tensor, size: int) -> Tensor:
    """Vectors [count, size] of a matrix, in units of their groups' scales."""
    grouped = x.reshape(*scale.shape, -1) / scale.to(x.dtype).unsqueeze(-1)
    return grouped.reshape(-1, size)


def entries_of(codes: Tensor, table: Tensor) -> Tensor:
    """The table's rows that codes stand for, [*codes.shape, size]."""
    return table[codes.to(torch.int64) + len(table) // 2]


@torch.library.custom_op("mcc::codebook_codes", mutates_args=())
def codebook_codes(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The codes of a weight.

    Args:
        x: float32, [out, in].
        scale: float16 or float32, [out, groups].
        table: float32, [entries, size]: size neighbouring inputs share a code.

    Returns:
        int8 [out, in / size], -entries / 2 to entries / 2 - 1.
    """
    codes = nearest_entries(_in_scales(x, scale, table.shape[1]), table) - len(table) // 2
    return codes.to(torch.int8).reshape(len(x), -1)


@codebook_codes.register_fake
def _(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    del scale
    return x.new_empty((x.shape[0], x.shape[1] // table.shape[1]), dtype=torch.int8)


@torch.library.custom_op("mcc::decode_codebook", mutates_args=())
def decode_codebook(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Float32 values [out, in] of what `codebook_codes` gives: the table's entries times the scales."""
    entries = entries_of(codes, table)
    grouped = entries.reshape(*scale.shape, -1) * scale.to(torch.float32).unsqueeze(-1)
    return grouped.reshape(len(codes), -1)


@decode_codebook.register_fake
def _(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    del scale
    return table.new_empty((codes.shape[0], codes.shape[1] * table.shape[1]))


@torch.library.custom_op("mcc::fake_codebook", mutates_args=())
def fake_codebook(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """decode_codebook(codebook_codes(x)), float in and out; the gradient passes straight through."""
    entries = table[nearest_entries(_in_scales(x, scale, table.shape[1]), table)]
    return (entries.reshape(*scale.shape, -1) * scale.to(x.dtype).unsqueeze(-1)).reshape(x.shape)


@fake_codebook.register_fake
def _(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    del scale, table
    return torch.empty_like(x)


fake_codebook.register_autograd(lambda _ctx, gradient: (gradient, None, None))
