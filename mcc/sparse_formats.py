"""Weights stored without their zeros: by elements, by blocks, or N of every M neighbouring inputs.

Which of them a mask allows is seen from the mask, whoever made it; the smallest is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcc.formats import packed_bytes

BLOCKS = ((16, 1), (4, 4), (1, 16), (8, 1), (1, 8), (4, 1), (1, 4))
"""Blocks of outputs by inputs that weights may be stored in, the largest first."""
AMONG = (4, 8)
"""Neighbouring inputs of which a few are stored."""


@torch.library.custom_op("mcc::decode_sparse", mutates_args=())
def decode_sparse(values: Tensor, columns: Tensor, row_pointers: Tensor, shape: list[int], block: list[int]) -> Tensor:
    """The dense tensor of a weight stored by rows of blocks, without its zeros (BSR; CSR where a block is 1 x 1).

    Args:
        values: [blocks * height * width], float32 or int8: block by block, each row by row.
        columns: [blocks], uint16 or int32: where in its row of blocks one stands (dims after the first are flattened).
        row_pointers: [shape[0] / height + 1], int32: row r has the blocks row_pointers[r] to row_pointers[r + 1].
        shape: of the result.
        block: height and width of a block.
    """
    height, width = block
    rows = torch.repeat_interleave(
        torch.arange(shape[0] // height), (row_pointers[1:] - row_pointers[:-1]).to(torch.int64)
    )
    dense = torch.zeros(shape[0] // height, height, int(np.prod(shape[1:])) // width, width, dtype=values.dtype)
    dense[rows, :, columns.to(torch.int64)] = values.reshape(-1, height, width)
    return dense.reshape(shape)


@decode_sparse.register_fake
def _(values: Tensor, columns: Tensor, row_pointers: Tensor, shape: list[int], block: list[int]) -> Tensor:
    del columns, row_pointers, block
    return values.new_empty(shape)


@torch.library.custom_op("mcc::decode_n_of_m", mutates_args=())
def decode_n_of_m(values: Tensor, places: Tensor, among: int) -> Tensor:
    """The dense matrix of a weight of which every `among` neighbouring inputs have few.

    Args:
        values: [rows, groups, kept], float32 or int8.
        places: the same shape, int8: where in its group a value stands, each place once at most.
        among: elements of a group.

    Returns:
        [rows, groups * among].
    """
    dense = torch.zeros(*values.shape[:2], among, dtype=values.dtype)
    return dense.scatter_(2, places.to(torch.int64), values).flatten(1)


@decode_n_of_m.register_fake
def _(values: Tensor, places: Tensor, among: int) -> Tensor:
    del places
    return values.new_empty(values.shape[0], values.shape[1] * among)


@dataclass(frozen=True)
class SparseRows:
    """A weight without its zeros; fields as `decode_sparse` takes them."""

    values: Tensor
    columns: Tensor
    row_pointers: Tensor
    block: tuple[int, int]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.row_pointers))


def mask_block(mask: Tensor) -> tuple[int, int]:
    """The largest of `BLOCKS` that a mask [rows, …] keeps or removes whole, or (1, 1)."""
    rows = mask.reshape(mask.shape[0], -1)
    smallest = [block for block in ((4, 1), (1, 4)) if _has_blocks(rows, *block)]  # each of the others has one of these
    if not smallest or not rows.any():
        return 1, 1
    return next(block for block in BLOCKS if _has_blocks(rows, *block))


def _has_blocks(rows: Tensor, height: int, width: int) -> bool:
    if rows.shape[0] % height or rows.shape[1] % width:
        return False
    blocks = _blocks(rows, height, width)
    return bool((blocks.all(3).all(1) == blocks.any(3).any(1)).all())


def _blocks(rows: Tensor, height: int, width: int) -> Tensor:
    """[rows / height, height, columns / width, width]."""
    return rows.reshape(rows.shape[0] // height, height, rows.shape[1] // width, width)


def encode_sparse(weight: Tensor, mask: Tensor) -> SparseRows:
    """Keep the elements of `weight` where `mask` is true, zero or not, in blocks where the mask has such.

    Args:
        weight: [rows, …], float32 or int8.
        mask: bool, the shape of weight.
    """
    block = height, width = mask_block(mask)
    kept = _blocks(mask.reshape(mask.shape[0], -1), height, width)[:, 0, :, 0]
    columns = kept.nonzero()[:, 1]
    counts = kept.sum(dim=1, dtype=torch.int64)
    row_pointers = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    narrow = torch.uint16 if kept.shape[1] <= 1 << 16 else torch.int32
    values = _blocks(weight.reshape(weight.shape[0], -1), height, width).transpose(1, 2)[kept].reshape(-1)
    return SparseRows(values.clone(), columns.to(narrow), row_pointers.to(torch.int32), block)


def sparse_bytes(mask: Tensor, element_size: int) -> int:
    """Bytes `encode_sparse` would store for this mask, without encoding."""
    return _bytes_in_blocks(mask, mask_block(mask), element_size)


def _bytes_in_blocks(mask: Tensor, block: tuple[int, int], element_size: int) -> int:
    height, width = block
    columns = mask.numel() // max(mask.shape[0], 1) // width
    index_size = 2 if columns <= 1 << 16 else 4
    kept, rows = int(mask.sum()), mask.shape[0] // height
    return kept * element_size + kept // (height * width) * index_size + 4 * (rows + 1)


@dataclass(frozen=True)
class NofM:
    """A weight of which every `among` neighbouring inputs have few; fields as `decode_n_of_m` takes them."""

    values: Tensor
    places: Tensor
    among: int

    @property
    def bits(self) -> int:
        """Of a place as it is packed."""
        return place_bits(self.among)


def place_bits(among: int) -> int:
    """Bits that a place among so many takes."""
    return (among - 1).bit_length()


def mask_among(mask: Tensor) -> tuple[int, int] | None:
    """The N and M with the fewest stored elements for a mask [rows, inputs], or None if half of them are too few."""
    if mask.dim() != 2 or not mask.any():
        return None
    found = []
    for among in AMONG:
        if mask.shape[1] % among == 0:
            kept = int(mask.reshape(mask.shape[0], -1, among).sum(-1).max())
            if 2 * kept <= among:
                found.append((kept, among))
    return min(found, key=lambda pair: pair[0] / pair[1], default=None)


def encode_n_of_m(weight: Tensor, mask: Tensor) -> NofM:
    """Keep N of every M inputs, those the mask keeps and, where these are fewer, zeros.

    Args:
        weight: [rows, inputs], float32 or int8.
        mask: bool, the shape of weight, with a `mask_among`.
    """
    pattern = mask_among(mask)
    assert pattern is not None
    kept, among = pattern
    groups = mask.reshape(mask.shape[0], -1, among)
    places = groups.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :kept].sort(-1).values
    values = torch.where(mask, weight, 0).to(weight.dtype).reshape(groups.shape).gather(2, places)
    return NofM(values, places.to(torch.int8), among)


@dataclass(frozen=True)
class Form:
    """How a mask's weight is best stored without its zeros.

    Attributes:
        rows, columns: of a block; 1, 1 where single elements are stored, or N of M.
        kept, among: N and M, or 0, 0.
        stored_bytes: of values and indices.
    """

    rows: int
    columns: int
    kept: int
    among: int
    stored_bytes: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.among}" if self.among else f"blocks of {self.rows}x{self.columns}"


def smallest_form(mask: Tensor, bits: int) -> Form:
    """The form of fewest bytes for elements of so many bits, without encoding; rows store none of fewer than 8."""
    block = mask_block(mask)
    rows = Form(*block, 0, 0, _bytes_in_blocks(mask, block, -(-bits // 8)))
    among = form_among(mask, bits)
    return rows if among is None or rows.stored_bytes <= among.stored_bytes else among


def form_among(mask: Tensor, bits: int) -> Form | None:
    """N of M as a form for elements of so many bits, where the mask has a `mask_among`."""
    pattern = mask_among(mask)
    if pattern is None:
        return None
    stored = mask.numel() // pattern[1] * pattern[0]
    return Form(1, 1, *pattern, packed_bytes(stored, bits) + packed_bytes(stored, place_bits(pattern[1])))
