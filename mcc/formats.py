"""Stored formats: how a compressed weight or activation stands in a graph, as ops that run in plain PyTorch.

A compressed weight is an expression: `dequantize(codes, scale, …)`, `decode_sparse(values, …)` of sparse_formats.py, or
one inside the other; codes of a few bits stand packed, under `unpack`. Kernels read the operands of these ops as they
are stored; everything else runs the ops. During training a quantizer is `fake_quantize`, which has gradients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALLEST_ROW = 1e-35  # a row's largest value, so that its scale and its inverse are normal float32 numbers


def along_axis(vector: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Scales or zero points shaped to broadcast against `like`.

    Args:
        vector: [] for all elements; [like.shape[axis]]; or, where axis is 0, [like.shape[0], groups] for a matrix whose
            rows are cut into groups of equal length.
        like: the tensor they belong to.
        axis: None where vector is [].
    """
    if axis is None or vector.dim() == 0:
        return vector
    if vector.dim() == 2:
        return vector.repeat_interleave(like.shape[1] // vector.shape[1], dim=1)
    return vector.reshape([-1 if i == axis else 1 for i in range(like.dim())])


def nearest(in_steps: Tensor, zero: Tensor) -> Tensor:
    """Codes before they are clamped: x / scale rounded half to even, so that code - zero point is nearest to it."""
    whole = zero.floor()
    return torch.round(in_steps + (zero - whole)) + whole


@torch.library.custom_op("mcc::quantize", mutates_args=())
def quantize(  # noqa: PLR0913 (an op's schema)
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """Codes of x: clamp(round(x / scale) + zero_point, low, high), rounding half to even; see `nearest` for halves.

    Args:
        x: float, any shape.
        scale: float32, [] or [x.shape[axis]]; or, for groups, float32 or float16 [x.shape[0], groups] with axis 0.
        zero_point: int32, int8 or float16 (-1/2 where codes stand for midpoints), the shape of scale or [].
        axis: the dim of x that scale runs along, or None for one scale.
        low: the smallest code.
        high: the largest code.
        dtype: of the codes: torch.uint8, torch.int8 or torch.int16.
    """
    codes = nearest(x / along_axis(scale, x, axis), along_axis(zero_point, x, axis))
    return torch.clamp(codes, low, high).to(dtype)


@quantize.register_fake
def _(  # noqa: PLR0913 (as above)
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    del scale, zero_point, axis, low, high
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("mcc::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Float32 values of codes: (codes - zero_point) * scale. Arguments as `quantize` has them."""
    shifted = codes.to(torch.float32) - along_axis(zero_point, codes, axis)
    return shifted * along_axis(scale, codes, axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    del scale, zero_point, axis
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("mcc::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """dequantize(quantize(x)), float in and out; the gradient passes straight through inside the range.

    Bengio, Léonard, Courville: Estimating or propagating gradients through stochastic neurons. arXiv 1308.3432, 2013.
    The gradient of a scale that asks for one is that of Esser, McKinstry, Bablani, Appuswamy, Modha: Learned step size
    quantization. ICLR 2020: code - zero_point - x / scale inside the range, code - zero_point at its ends.
    """
    step, zero = along_axis(scale, x, axis), along_axis(zero_point, x, axis)
    return (torch.clamp(nearest(x / step, zero), low, high) - zero) * step


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    del scale, zero_point, axis, low, high
    return torch.empty_like(x)


def _save_for_gradients(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, int | None, int, int],
    output: Tensor,
) -> None:
    del output
    x, scale, zero_point, axis, low, high = inputs
    in_steps, zero = x / along_axis(scale, x, axis), along_axis(zero_point, x, axis)
    codes = nearest(in_steps, zero)
    inside = (codes >= low) & (codes <= high)
    ctx.scale_shape, ctx.axis = scale.shape, axis  # type: ignore[attr-defined]  # torch's stub lacks what one sets
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]  # and this
        ctx.save_for_backward(inside, torch.clamp(codes, low, high) - zero - in_steps * inside)
    else:
        ctx.save_for_backward(inside)


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    inside, *slope = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub lacks it
    if not slope:
        return gradient * inside, None, None, None, None, None
    shape, axis = ctx.scale_shape, ctx.axis  # type: ignore[attr-defined]  # as above
    by_element = gradient * slope[0]
    if len(shape) == 2:  # groups of a row's inputs
        to_scale = by_element.reshape(*shape, -1).sum(-1)
    else:
        to_scale = by_element.sum([i for i in range(by_element.dim()) if i != axis]).reshape(shape)
    return gradient * inside, to_scale, None, None, None, None


fake_quantize.register_autograd(_gradients, setup_context=_save_for_gradients)


@torch.library.custom_op("mcc::fake_quantize_per_token", mutates_args=())
def fake_quantize_per_token(x: Tensor, limit: int) -> Tensor:
    """Round each row of x to codes with a scale of its own, chosen when it comes; the gradient passes straight through.

    The largest |x| of a row, its last dim, gets the code `limit`: codes are round(x * (limit / largest)), half to even,
    and values codes * (largest / limit). A row with nothing above `SMALLEST_ROW` becomes zeros. Yao, Yazdani Aminabadi,
    Zhang, Wu, Li, He: ZeroQuant: efficient and affordable post-training quantization for large-scale transformers.
    NeurIPS 2022.

    Args:
        x: float32, [..., elements].
        limit: the largest code; the least is its negative.
    """
    largest = x.abs().amax(-1, keepdim=True)
    codes = torch.round(x * torch.where(largest > SMALLEST_ROW, limit / largest, 0.0))
    return codes * (largest / limit)


@fake_quantize_per_token.register_fake
def _(x: Tensor, limit: int) -> Tensor:
    del limit
    return torch.empty_like(x)


fake_quantize_per_token.register_autograd(lambda _ctx, gradient: (gradient, None))


@torch.library.custom_op("mcc::unpack", mutates_args=())
def unpack(packed: Tensor, bits: int, low: int, shape: list[int]) -> Tensor:
    """The int8 codes of a stream of bits.

    Args:
        packed: [ceil(elements * bits / 8)], uint8: code - low of every element after one another, lowest bit first.
        bits: of a code, 1 to 7.
        low: the smallest code.
        shape: of the result.
    """
    count = int(np.prod(shape))
    stream = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    codes = np.packbits(stream, axis=1, bitorder="little").reshape(shape).astype(np.int8) + np.int8(low)
    return torch.from_numpy(codes)


@unpack.register_fake
def _(packed: Tensor, bits: int, low: int, shape: list[int]) -> Tensor:
    del bits, low
    return packed.new_empty(shape, dtype=torch.int8)


def pack(codes: Tensor, bits: int, low: int) -> Tensor:
    """What `unpack` reads: int8 codes of any shape, low to low + 2^bits - 1, as uint8 [ceil(elements * bits / 8)]."""
    shifted = (codes.numpy().reshape(-1).astype(np.int16) - low).astype(np.uint8)
    stream = np.unpackbits(shifted[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def packed_bytes(elements: int, bits: int) -> int:
    """Bytes that `pack` gives."""
    return -(-elements * bits // 8)
