"""The function around every kernel of a region: its parameters, and what its body is given of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcc.backends.cpu.epilogue import Epilogue
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, flat, kernel_function, product

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from tvm.tirx import PrimFunc

    from mcc.backends.kernel import Region


def region_function(
    name: str,
    region: Region,
    vectors: Vectors,
    dims: tuple[tuple[Any, ...], tuple[Any, ...]],
    packed: Mapping[str, NDArray[Any]],
    body: Callable[[Expression, dict[str, Expression], Epilogue], None],
) -> PrimFunc:
    """A function of the source, the epilogue's operands, the packed arrays and the output.

    Args:
        name: of the function.
        region: that it runs.
        vectors: of the target.
        dims: of the source and of the output.
        packed: arrays the kernel reads, by name.
        body: given the source, seen flat, the packed arrays by name, and the epilogue that writes the output.
    """
    source, result = dims
    parameters = [
        Parameter("X", source, region.source_dtype),
        *(Parameter(f"A{i}", result, kind) for i, kind in enumerate(region.operand_dtypes)),
        *(Parameter(key, array.shape, array.dtype.name) for key, array in packed.items()),
        Parameter("Y", result, region.output_dtype),
    ]
    count, size = len(region.operands), product(result)

    def emit(x: Expression, *rest: Expression) -> None:
        operands = [flat(a, size) for a in rest[:count]]
        epilogue = Epilogue(vectors, region, operands, flat(rest[-1], size))
        body(flat(x, product(source)), dict(zip(packed, rest[count:-1], strict=True)), epilogue)

    return kernel_function(name, parameters, emit)
