"""What the loops of every convolution with channels last have in common: their function, and what it hands them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.region_function import region_function
from mcc.backends.cpu.kernels.tiles import leading_dims

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tvm.tirx import PrimFunc

    from mcc.backends.cpu.epilogue import Epilogue
    from mcc.backends.cpu.microkernel import Expression, Vectors
    from mcc.backends.kernel import Region


class ConvolutionBody:
    """Subclasses pack the arrays that they read, and emit their loops.

    Attributes:
        shape: the sizes; a height or width that varies is a variable.
        whole: the same, where subclasses change `shape`.
        example: the same by the example inputs, to choose by.
    """

    packed: dict[str, NDArray[Any]]

    def __init__(self, region: Region, vectors: Vectors) -> None:
        shape = conv_shape(region)
        assert isinstance(shape, ConvShape)
        self.region, self.v, self.example = region, vectors, shape
        self.batch, *image = leading_dims(region.source.shape[:3])
        self.shape = self.whole = replace(shape, image=tuple(image))

    def function(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        source = (self.batch, *self.whole.image, self.whole.inputs)
        result = (self.batch, *self.whole.result, self.whole.outputs)
        return region_function(name, self.region, self.v, (source, result), self.packed, self._emit)

    def _emit(self, x: Expression, arrays: dict[str, Expression], epilogue: Epilogue) -> None:
        self.x, self.arrays, self.epilogue = x, arrays, epilogue
        self.loops()

    def loops(self) -> None:
        """Emit the whole kernel, over `batch` images."""
        raise NotImplementedError
