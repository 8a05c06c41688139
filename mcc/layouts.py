"""Window ops with channels last, as ops that run in plain PyTorch: what backends put in place of the NCHW ones.

Activations are [batch, height, width, channels]; weights stay [out, in / groups, kernel height, kernel width].
"""

from __future__ import annotations

import torch
from torch import Tensor

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    """As memory that is contiguous with channels last, which is what the fake values say too."""
    return x.permute(TO_LAST).contiguous()


def _sizes(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    padded = [x.shape[1] + padding[0] + padding[2], x.shape[2] + padding[1] + padding[3]]
    return [
        (p - d * (k - 1) - 1) // s + 1 for p, k, s, d in zip(padded, kernel, stride, dilation, strict=True)
    ]  # fmt: skip


@torch.library.custom_op("mcc::conv2d_nhwc", mutates_args=())
def conv2d_nhwc(  # noqa: PLR0913 (an op's schema)
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """conv2d of x [n, h, w, c] with zero padding [top, left, bottom, right]."""
    top, left, bottom, right = padding
    padded = torch.nn.functional.pad(x.permute(TO_FIRST), [left, right, top, bottom])
    return _last(torch.nn.functional.conv2d(padded, weight, bias, stride, 0, dilation, groups))


@conv2d_nhwc.register_fake
def _(  # noqa: PLR0913 (as above)
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    del bias, groups
    return x.new_empty([x.shape[0], *_sizes(x, list(weight.shape[2:]), stride, padding, dilation), weight.shape[0]])


@torch.library.custom_op("mcc::max_pool2d_nhwc", mutates_args=())
def max_pool2d_nhwc(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The largest value of every window of x [n, h, w, c]; padding [top, left, bottom, right] is never largest."""
    top, left, bottom, right = padding
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    padded = torch.nn.functional.pad(x.permute(TO_FIRST), [left, right, top, bottom], value=lowest)
    return _last(torch.nn.functional.max_pool2d(padded, kernel, stride))


@max_pool2d_nhwc.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return x.new_empty([x.shape[0], *_sizes(x, kernel, stride, padding, [1, 1]), x.shape[3]])


@torch.library.custom_op("mcc::avg_pool2d_nhwc", mutates_args=())
def avg_pool2d_nhwc(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], count_include_pad: bool  # noqa: FBT001
) -> Tensor:  # fmt: skip
    """The mean of every window of x [n, h, w, c], padding [height, width] on both sides."""
    pooled = torch.nn.functional.avg_pool2d(
        x.permute(TO_FIRST), kernel, stride, padding, count_include_pad=count_include_pad
    )
    return _last(pooled)


@avg_pool2d_nhwc.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], count_include_pad: bool) -> Tensor:  # noqa: FBT001
    del count_include_pad
    return x.new_empty([x.shape[0], *_sizes(x, kernel, stride, padding * 2, [1, 1]), x.shape[3]])


@torch.library.custom_op("mcc::upsample_nhwc", mutates_args=())
def upsample_nhwc(x: Tensor, size: list[int], mode: str, align_corners: bool | None) -> Tensor:  # noqa: FBT001
    """Resample x [n, h, w, c] to size [height, width]: mode nearest or bilinear, as torch's interpolate has them."""
    resized = torch.nn.functional.interpolate(x.permute(TO_FIRST), size, mode=mode, align_corners=align_corners)
    return _last(resized)


@upsample_nhwc.register_fake
def _(x: Tensor, size: list[int], mode: str, align_corners: bool | None) -> Tensor:  # noqa: FBT001
    del mode, align_corners
    return x.new_empty([x.shape[0], *size, x.shape[3]])


@torch.library.custom_op("mcc::group_norm_nhwc", mutates_args=())
def group_norm_nhwc(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """group_norm of x [n, h, w, c]; with as many groups as channels, instance_norm."""
    return _last(torch.nn.functional.group_norm(x.permute(TO_FIRST), groups, weight, bias, eps))


@group_norm_nhwc.register_fake
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    del groups, weight, bias, eps
    return x.new_empty(x.shape)
