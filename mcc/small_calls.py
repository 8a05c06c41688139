"""Small calls of an artifact: straight to its kernels, into outputs that are made several at once.

What a call through TVM's virtual machine costs beside its kernels is as much as a small network takes, and most of it
is equal for all calls of equal shapes: what is checked, and where weights, activations and outputs lie. Here that is
kept, in a table that the library's function reads. Outputs come in slabs, of which each call takes the next, so that
a call hands over one number for all of them; an input is handed over as the object it is, in which the function reads
what numpy has there, as any extension of numpy does: class, dtype, shape, layout and address.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mcc.artifact import ALIGNMENT, ARRAY_WORDS, CONTIGUOUS_ALIGNED, SMALL_CALL
from mcc.memory import room

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

Shape: TypeAlias = tuple[int, ...]
Kind: TypeAlias = "tuple[Shape, np.dtype[Any]]"
MOST_SHAPES = 64  # that an artifact remembers
MOST_OUTPUTS = 64  # of a slab: a caller that keeps one of them keeps them all


@dataclass(frozen=True)
class Library:
    """What all small calls of an artifact have in common.

    Attributes:
        run: the function, of the table, the inputs' dims that may vary, the `id` of each input, and the number of the
            outputs in their slabs; it gives 1 where the inputs were arrays of the right dtypes and shapes.
        alone: whether none of its kernels uses several threads.
        use_threads: to be called before it otherwise.
        dtypes: of the inputs.
        weights: arrays it reads.
        new_places: makes the arrays of a workspace.
        as_tensor: makes a tensor that it takes of an array.
        dims: input and axis of each dim that may vary.
    """

    run: Callable[..., Any]
    alone: bool
    use_threads: Callable[[], None]
    dtypes: Sequence[np.dtype[Any]]
    weights: Sequence[NDArray[Any]]
    new_places: Callable[[], Sequence[NDArray[Any]]]
    as_tensor: Callable[[NDArray[Any]], Any]
    dims: Sequence[tuple[int, int]]


def arrays_are_readable() -> bool:
    """Whether arrays are laid out as CPython and numpy lay them out, so that there can be small calls."""
    return _is_readable(np.empty((3, 5))) and _is_readable(np.empty((3, 5))[:, :2])


def _is_readable(array: NDArray[Any]) -> bool:
    words = (ctypes.c_int64 * (max(ARRAY_WORDS.values()) + 1)).from_address(id(array))
    found = {name: words[at] for name, at in ARRAY_WORDS.items()}
    flags = array.flags.c_contiguous | array.flags.aligned << CONTIGUOUS_ALIGNED.bit_length() - 1
    objects = found["type"], found["dtype"], found["values"], found["rank"] & 0xFFFFFFFF
    return (
        objects == (id(np.ndarray), id(array.dtype), array.ctypes.data, array.ndim)
        and found["flags"] & CONTIGUOUS_ALIGNED == flags
        and tuple((ctypes.c_int64 * array.ndim).from_address(found["dims"])) == array.shape
    )


class Context:
    """What one call at a time of given shapes works with.

    Attributes:
        run: the library's function with the table of where weights, activations and slabs lie, and dims that may vary.
        left: outputs that no call has got yet; the last one's number is how many are before it.
    """

    __slots__ = ("_entries", "_places", "_slabs", "left", "run")

    def __init__(self, library: Library, shapes: tuple[Shape, ...], outputs: Sequence[Kind]) -> None:
        self._places = library.new_places()
        sizes = [-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in outputs]
        count = max(1, min(MOST_OUTPUTS, SMALL_CALL // sum(sizes)))
        self._slabs = [
            ((count, *shape), dtype, (size, *np.empty(shape, dtype).strides))
            for (shape, dtype), size in zip(outputs, sizes, strict=True)
        ]
        objects = [id(np.ndarray), *map(id, library.dtypes)]
        addresses = [array.ctypes.data for array in (*library.weights, *self._places)]
        entries = [*objects, *addresses, *[0] * len(outputs)]
        # the library takes tensors to lie at such multiples, and may read several entries at once
        self._entries = room(len(entries) * np.dtype(np.int64).itemsize).view(np.int64)
        self._entries[...] = entries
        sizes = [shapes[i][axis] for i, axis in library.dims]
        self.run = partial(library.run, library.as_tensor(self._entries), *sizes)
        self.left: list[tuple[NDArray[Any], ...]] = []

    def refill(self) -> None:
        """Make new slabs."""
        slabs = []
        for i, (shape, dtype, strides) in enumerate(self._slabs, -len(self._slabs)):
            memory = room(shape[0] * strides[0])
            self._entries[i] = memory.ctypes.data
            rows = np.ndarray(shape, dtype, memory, 0, strides)
            # of an array with one dim, the elements are no arrays
            slabs.append(list(rows) if rows.ndim > 1 else [rows[k, ...] for k in range(len(rows))])
        self.left = list(zip(*slabs, strict=True))


class SmallCalls:
    """The small calls of an artifact, by the shapes of their inputs.

    Args:
        library: to call.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[tuple[Shape, ...], tuple[list[Context], Sequence[Kind]]] = {}
        self._last: list[Context] = []  # of the shapes that the last call had

    @property
    def shapes(self) -> list[tuple[Shape, ...]]:
        """Of the inputs for which a call is known to be small."""
        return list(self._known)

    def remember(
        self, shapes: tuple[Shape, ...], arrays: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
    ) -> None:
        """Take the next calls with inputs of these shapes, if inputs and outputs together are small."""
        size = 0
        for array in (*arrays, *outputs):
            size += array.nbytes
            if not array.size or size > SMALL_CALL:
                return
        if len(self._known) >= MOST_SHAPES:
            return
        kinds = [(output.shape, output.dtype) for output in outputs]
        self._known.setdefault(shapes, ([], kinds))  # another thread may have remembered them

    def call(self, arrays: Sequence[NDArray[Any]], shapes: tuple[Shape, ...]) -> Sequence[NDArray[Any]] | None:
        """The outputs for arrays of these shapes; None where such a call is not known to be small, or cannot be."""
        known = self._known.get(shapes)
        if known is None:
            return None
        free, outputs_like = known
        self._last, library = free, self._library
        if not library.alone:
            library.use_threads()
        try:
            context = free.pop()
        except IndexError:  # as many are made as there are calls at once
            context = Context(library, shapes, outputs_like)
        try:
            if not context.left:
                context.refill()
            outputs = context.left.pop()
            done = context.run(*map(id, arrays), len(context.left))
            if not done:
                context.left.append(outputs)
        finally:
            free.append(context)
        return outputs if done else None

    def one_for_one(self) -> Callable[[Any], NDArray[Any] | None]:
        """`call` for a value that gives one array; None where it is no array of a shape known to be small.

        It does nothing that the general way does not, in a third of its time, which counts beside a small network.
        """
        alone, use_threads = self._library.alone, self._library.use_threads

        def call(value: Any) -> NDArray[Any] | None:
            free = self._last
            try:
                context = free.pop()
            except IndexError:
                return None
            try:
                if not alone:
                    use_threads()
                left = context.left
                if not left:
                    context.refill()
                    left = context.left
                (output,) = left.pop()
                if context.run(id(value), len(left)):
                    return output
                left.append((output,))
            except (RuntimeError, MemoryError):  # the general way says why
                return None
            finally:
                free.append(context)
            return call(value) if self._turn_to(value, free) else None

        return call

    def _turn_to(self, value: Any, tried: list[Context]) -> bool:
        """Whether a value has another shape for which calls are small; it is that of the last call then."""
        known = self._known.get((value.shape,)) if type(value) is np.ndarray else None
        if known is None or known[0] is tried:
            return False
        self._last = known[0]
        return True
