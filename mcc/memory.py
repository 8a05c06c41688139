"""Arrays where kernels can read and write them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mcc.artifact import ALIGNMENT, Workspace

if TYPE_CHECKING:
    from numpy.typing import NDArray


def aligned(array: NDArray[Any], alignment: int = ALIGNMENT) -> NDArray[Any]:
    """`array` itself where it is contiguous, writable and aligned, else a copy that is."""
    flags = array.flags
    if array.size == 0:
        # numpy gives empty arrays zero strides, which DLPack's consumers refuse
        return np.empty(tuple(max(s, 1) for s in array.shape), array.dtype)[tuple(slice(0, s) for s in array.shape)]
    if flags.c_contiguous and flags.writeable and array.ctypes.data % alignment == 0:
        return array
    copy = room(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def room(size: int) -> NDArray[np.uint8]:
    """New memory of `size` bytes, at a multiple of `ALIGNMENT`."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def workspace_arrays(workspace: Workspace) -> list[NDArray[Any]]:
    """New memory, as the arrays that lie in it; they overlap."""
    memory = room(workspace.size)
    arrays = []
    for place in workspace.places:
        dtype = np.dtype(place.dtype)
        count = math.prod(place.shape)
        flat = memory[place.offset : place.offset + count * dtype.itemsize].view(dtype)
        arrays.append(flat.reshape(place.shape) if count else aligned(np.empty(place.shape, dtype)))
    return arrays
