"""Quads: four neighbouring pixels of one channel in a 32-bit lane, as `dot4` takes them, made by interleaving bytes.

Interleaving works in parts of 128 bits and leaves the channels of a block out of order: packing sums to codes undoes
it, and where the results are not just codes, pixels are sorted beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Expression, Vectors

QUAD = 4


def interleaved(lanes: int) -> NDArray[np.int64]:
    """The channel that each lane of a quad's four vectors holds, of a block that was not sorted."""
    channels = np.arange(lanes * QUAD).reshape(lanes // 4, QUAD, 4)  # [128 bits][vector][lane]
    return channels.transpose(1, 0, 2).reshape(-1)


def sort_channels(v: Vectors, codes: Expression) -> Expression:
    """Words of four channels in such order that their quads' lanes are in order."""
    words = np.arange(v.lanes).reshape(QUAD, v.lanes // 4).T.reshape(-1)
    shuffled = tirx.Shuffle([T.reinterpret(f"int32x{v.lanes}", codes)], words.tolist())
    return T.reinterpret(f"uint8x{v.lanes * QUAD}", shuffled)


def pair(v: Vectors, a: Expression, b: Expression, halves: Sequence[int]) -> list[Expression]:
    """Two pixels as 16-bit words (a, b) of each channel: of every 128 bits the low half, 0, or the high one, 1."""
    count = v.lanes * QUAD
    return [B.Bind(T.reinterpret(f"int16x{count // 2}", _unpack(a, b, count, 16, high=bool(h)))) for h in halves]


def interleave(v: Vectors, first: Expression, second: Expression, half: int) -> Expression:
    """Two pairs as 32-bit lanes of four pixels: of every 128 bits the low half of the pairs, 0, or the high one, 1."""
    count = v.lanes * 2
    a, b = (T.reinterpret(f"int16x{count}", pairs) for pairs in (first, second))
    return B.Bind(T.reinterpret(f"int32x{v.lanes}", _unpack(a, b, count, 8, high=bool(half))))


def _unpack(a: Expression, b: Expression, count: int, part: int, *, high: bool) -> Expression:
    """Interleave the low or high halves of every 128 bits of two vectors of `count` elements, `part` in 128 bits."""
    half = part // 2 if high else 0
    picked = [e for start in range(0, count, part) for i in range(part // 2) for e in (start + half + i,) * 2]
    return tirx.Shuffle([a, b], [e + count * (i % 2) for i, e in enumerate(picked)])
