"""Sample calls of every op in the table: a function of the batch size, and which arguments have it as their first dim."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_generator = torch.Generator().manual_seed(0)


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator)


def positive(*shape: int) -> torch.Tensor:
    return f(*shape).abs() + 0.1


def i(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def b(*shape: int) -> torch.Tensor:
    return f(*shape) > 0


@dataclass(frozen=True)
class Sample:
    """One call: `args(batch)`; positions in `dynamic` are inputs with a batch dim, other tensors are stored."""

    args: Callable[[int], tuple[Any, ...]]
    dynamic: tuple[int, ...] = (0,)
    options: tuple[tuple[str, Any], ...] = ()
    fixed_batch: bool = False


def _same(names: str, *samples: Sample) -> dict[str, tuple[Sample, ...]]:
    return dict.fromkeys(names.split(), samples)


S = Sample
_unary = S(lambda n: (f(n, 5, 3) * 3,))
_unary_positive = S(lambda n: (positive(n, 7),))
_two = S(lambda n: (f(n, 4, 3), f(4, 3)))
_two_broadcast = S(lambda n: (f(n, 4, 1), f(n, 1, 3)), (0, 1))

SAMPLES: dict[str, tuple[Sample, ...]] = {
    **_same(
        "relu relu6 gelu silu mish neg abs exp sin cos tanh sigmoid hardsigmoid hardswish hardtanh leaky_relu elu selu celu "
        "softplus log_sigmoid erf sign ceil floor round square isnan",
        _unary,
    ),
    **_same("trunc tan atan sinh cosh asinh exp2 expm1 erfc", _unary),
    **_same("log2 log10", _unary_positive),
    **_same("asin acos atanh", S(lambda n: (f(n, 5, 3).tanh() * 0.9,))),
    **_same("log log1p sqrt rsqrt reciprocal", _unary_positive),
    "acosh": (S(lambda n: (positive(n, 7) + 1,)),),
    "atan2": (_two, _two_broadcast),
    "fmod.Tensor": (
        S(lambda n: (f(n, 7) * 5, positive(n, 7) + 0.5), (0, 1)),
        S(lambda n: (i(19, n, 4) - 9, i(4, n, 4) + 1), (0, 1)),
    ),
    "fmod.Scalar": (S(lambda n: (f(n, 7) * 5, 1.5)), S(lambda n: (i(19, n, 4) - 9, 4))),
    **_same("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", S(lambda n: (i(16, n, 5), 5))),
    **_same("bitwise_left_shift.Tensor bitwise_right_shift.Tensor", S(lambda n: (i(64, n, 5), i(4, n, 5)), (0, 1))),
    **_same("bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar", S(lambda n: (i(64, n, 5), 2))),
    "logical_xor": (S(lambda n: (b(n, 5), b(n, 5)), (0, 1)), S(lambda n: (f(n, 5).round(), f(5).round()))),
    "prod": (S(lambda n: (positive(n, 3),)),),
    "prod.dim_int": (S(lambda n: (f(n, 5, 3), 1)), S(lambda n: (i(4, n, 5), -1, True))),
    "cumprod": (S(lambda n: (f(n, 5, 3), 1)),),
    "mcc.grouped_matmul": (
        S(lambda n: (f(n, 6), f(3, 6, 5), torch.tensor([0, n // 2, n], dtype=torch.int32))),
        S(lambda n: (f(n, 6), f(3, 6, 20), torch.tensor([1, 1, 1], dtype=torch.int32))),
    ),
    "index_put": (
        S(lambda n: (f(n, 5, 3), [None, i(5, 4)], f(n, 4, 3), True), (0, 2)),
        S(lambda n: (f(n, 5, 3), [None, torch.tensor([4, 0])], f(3))),
        S(lambda n: (f(n, 5, 3), [None, torch.tensor([[4], [-2]]), torch.tensor([0, 2])], f(n, 2, 2)), (0, 2)),
        S(
            lambda n: (f(2, 5, 3), [torch.tensor([1, 0]), None, torch.tensor([0, 2])], f(2, 5)),
            (0, 2),
            fixed_batch=True,
        ),
        S(lambda n: (f(n, 5), [b(n, 5)], torch.tensor(2.0)), (0,), fixed_batch=True),
    ),
    "scatter.src": (
        S(
            lambda n: (
                f(n, 6),
                1,
                torch.stack([torch.randperm(6, generator=_generator)[:4] for _ in range(n)]),
                f(n, 5),
            ),
            (0, 2, 3),
        ),
    ),
    "scatter.value": (S(lambda n: (f(n, 6), -1, i(6, n, 3), 2.5), (0, 2)),),
    "scatter_add": (S(lambda n: (f(n, 6, 2), 1, i(6, n, 9, 2), f(n, 9, 2)), (0, 2, 3)),),
    **_same("add.Tensor mul.Tensor maximum minimum max.other min.other", _two, _two_broadcast),
    **_same("sub.Tensor div.Tensor", _two, S(lambda n: (f(n, 4), 3.0)), S(lambda n: (i(9, n, 4), 2))),
    **_same(
        "le.Tensor lt.Tensor ge.Tensor gt.Tensor eq.Tensor ne.Tensor", S(lambda n: (i(3, n, 6), i(3, n, 6)), (0, 1))
    ),
    **_same(
        "le.Scalar lt.Scalar ge.Scalar gt.Scalar eq.Scalar ne.Scalar",
        S(lambda n: (i(3, n, 6), 1)),
        S(lambda n: (f(n, 6), 0.5)),
    ),
    **_same(
        "__and__.Tensor __or__.Tensor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor",
        S(lambda n: (b(n, 5), b(n, 5)), (0, 1)),
        S(lambda n: (i(16, n, 5), i(16, n, 5)), (0, 1)),
    ),
    **_same("logical_and logical_or", S(lambda n: (b(n, 5), b(n, 5)), (0, 1)), S(lambda n: (f(n, 5), f(n, 5)), (0, 1))),
    **_same("bitwise_not logical_not", S(lambda n: (b(n, 5),))),
    "mcc.lstm": (
        S(lambda n: (f(n, 5, 32), f(n, 8), f(n, 8), f(8, 32), f(32), False, True), (0, 1, 2)),
        S(lambda n: (f(n, 1, 148), f(n, 37), f(n, 37), f(37, 148), None, True, True), (0, 1, 2)),
        S(lambda n: (f(6, 2, 80), f(2, 20), f(2, 20), f(20, 80), f(80), True, False), (0, 1, 2), fixed_batch=True),
    ),
    "mcc.gru": (
        S(lambda n: (f(n, 5, 24), f(n, 8), f(8, 24), f(24), False, True), (0, 1)),
        S(lambda n: (f(n, 3, 111), f(n, 37), f(37, 111), None, True, True), (0, 1)),
    ),
    "gelu": (_unary, S(lambda n: (f(n, 5),), options=(("approximate", "tanh"),))),
    "clamp": (S(lambda n: (f(n, 6), -0.5, 0.5)), S(lambda n: (f(n, 6), None, 0.3)), S(lambda n: (i(9, n, 6), 2, 5))),
    "clamp_min": (S(lambda n: (f(n, 6), 0.2)),),
    "clamp_max": (S(lambda n: (f(n, 6), 0.2)),),
    "pow.Tensor_Scalar": tuple(S(lambda n, e=e: (positive(n, 5), e)) for e in (0, 1, 2, 3, 0.5, -0.5, -1, 1.7))
    + (S(lambda n: (i(5, n, 5), 3)),),
    "pow.Scalar": (S(lambda n: (2.0, f(n, 5)), (1,)),),
    "pow.Tensor_Tensor": (S(lambda n: (positive(n, 5), f(n, 5)), (0, 1)),),
    "rsub.Scalar": (S(lambda n: (f(n, 5), 2.0)), S(lambda n: (f(n, 5), 1.0, 3))),
    "div.Tensor_mode": (
        S(lambda n: (f(n, 5), positive(5)), options=(("rounding_mode", "floor"),)),
        S(lambda n: (i(20, n, 5) - 10, 3), options=(("rounding_mode", "trunc"),)),
        S(lambda n: (i(20, n, 5) - 10, 3), options=(("rounding_mode", "floor"),)),
    ),
    "floor_divide": (S(lambda n: (i(20, n, 5) - 10, 3)),),
    **_same("remainder.Scalar", S(lambda n: (f(n, 5), 0.7)), S(lambda n: (i(20, n, 5) - 10, 3))),
    "remainder.Tensor": (S(lambda n: (f(n, 5), positive(5))),),
    "copy": (S(lambda n: (f(n, 4), i(5, n, 1)), (0, 1)),),
    "masked_fill.Scalar": (S(lambda n: (f(n, 5), b(n, 5), -3.0), (0, 1)),),
    "where.self": (S(lambda n: (b(n, 5), f(n, 5), f(5)), (0, 1)),),
    "where.ScalarOther": (S(lambda n: (b(n, 5), f(n, 5), 0.0), (0, 1)),),
    "where.ScalarSelf": (S(lambda n: (b(n, 5), 1.0, f(n, 5)), (0, 2)),),
    "prelu": (S(lambda n: (f(n, 4, 3), positive(4))), S(lambda n: (f(n, 4), positive(1)))),
    # layers
    "linear": (
        S(lambda n: (f(n, 13), f(7, 13), f(7))),
        S(lambda n: (f(n, 3, 8), f(40, 8), None)),
        S(lambda n: (f(n, 130), f(100, 130), f(100))),
    ),
    "addmm": (
        S(lambda n: (f(6), f(n, 4), f(4, 6)), (1,)),
        S(lambda n: (f(6), f(n, 4), f(4, 6)), (1,), (("beta", 2), ("alpha", 3))),
    ),
    "baddbmm": (S(lambda n: (f(n, 2, 5), f(n, 2, 3), f(n, 3, 5)), (0, 1, 2)),),
    **_same("matmul", S(lambda n: (f(n, 3, 4), f(4, 5))), S(lambda n: (f(n, 2, 3, 4), f(n, 2, 4, 5)), (0, 1))),
    "bmm": (S(lambda n: (f(n, 3, 4), f(n, 4, 5)), (0, 1)),),
    "conv1d": (S(lambda n: (f(n, 4, 15), f(6, 2, 3), f(6), [2], [1], [1], 2)),),
    "conv2d": (
        S(lambda n: (f(n, 3, 9, 11), f(16, 3, 3, 3), f(16), [2, 1], [1, 2], [1, 2])),
        S(lambda n: (f(n, 6, 7, 7), f(6, 1, 3, 3), f(6), [1, 1], [1, 1], [1, 1], 6)),
        S(lambda n: (f(n, 8, 5, 5), f(24, 4, 1, 1), None, [1, 1], [0, 0], [1, 1], 2)),
        S(lambda n: (f(n, 5, 17, 17), f(19, 5, 5, 5), f(19), [1, 1], [2, 2])),
    ),
    "mcc.conv2d_nhwc": (
        S(lambda n: (f(n, 9, 11, 3), f(16, 3, 3, 3), f(16), [2, 1], [1, 2, 0, 1], [1, 2], 1)),
        S(lambda n: (f(n, 7, 7, 18), f(18, 1, 3, 3), None, [1, 1], [1, 1, 1, 1], [1, 1], 18)),
        S(lambda n: (f(n, 5, 5, 32), f(32, 4, 1, 1), f(32), [1, 1], [0, 0, 0, 0], [1, 1], 8)),
    ),
    "mcc.attention": (
        S(lambda n: (f(n, 4, 7, 8), f(n, 4, 9, 8), f(n, 4, 9, 21), None, False, 0.3, [False] * 4), (0, 1, 2)),
        S(lambda n: (f(n, 13, 4, 24), f(n, 33, 2, 24), f(n, 33, 2, 16), None, True, 0.2, [True] * 4), (0, 1, 2)),
        S(
            lambda n: (
                f(n, 2, 5, 17),
                f(n, 6, 2, 17),
                f(n, 2, 6, 32),
                b(5, 6) | torch.eye(5, 6).bool(),
                False,
                0.2,
                [False, True, False, True],
            ),
            (0, 1, 2),
        ),
        S(
            lambda n: (f(n, 2, 70, 64), f(n, 2, 70, 64), f(n, 2, 70, 64), f(1, 2, 1, 70), False, 0.125, [False] * 4),
            (0, 1, 2),
        ),
        S(lambda n: (f(n, 13, 4, 24), f(n, 33, 2, 24), f(n, 33, 2, 16), None, True, 0.2, [True] * 4, 255), (0, 1, 2)),
    ),
    "mcc.rounded_attention": (
        S(lambda n: (f(n, 4, 7, 8), f(n, 4, 9, 8), f(n, 4, 9, 5)), (0, 1, 2)),
        S(lambda n: (f(n, 2, 7, 8), f(n, 2, 7, 8), f(n, 2, 7, 17), None, 0.0, True), (0, 1, 2), (("limit", 127),)),
        S(lambda n: (f(n, 2, 5, 8), f(n, 2, 6, 8), f(n, 2, 6, 8), b(5, 6) | torch.eye(5, 6).bool()), (0, 1, 2)),
        S(lambda n: (f(n, 4, 5, 8), f(n, 2, 5, 8), f(n, 2, 5, 8)), (0, 1, 2), (("enable_gqa", True), ("scale", 0.3))),
    ),
    "mcc.max_pool2d_nhwc": (S(lambda n: (f(n, 9, 10, 3), [3, 2], [2, 2], [1, 0, 1, 1])),),
    "mcc.avg_pool2d_nhwc": (
        S(lambda n: (f(n, 9, 9, 3), [3, 3], [2, 2], [1, 1], True)),
        S(lambda n: (f(n, 9, 9, 3), [3, 3], [2, 2], [1, 1], False)),
    ),
    "mcc.upsample_nhwc": (
        S(lambda n: (f(n, 4, 5, 3), [8, 10], "nearest", None)),
        S(lambda n: (f(n, 4, 5, 3), [7, 11], "bilinear", False)),
        S(lambda n: (f(n, 4, 5, 3), [7, 11], "bilinear", True)),
    ),
    "mcc.group_norm_nhwc": (
        S(lambda n: (f(n, 4, 5, 12), 3, f(12), f(12), 1e-5)),
        S(lambda n: (f(n, 4, 5, 32), 32, None, None, 1e-3)),
    ),
    "conv3d": (S(lambda n: (f(n, 4, 5, 6, 7), f(6, 2, 3, 3, 3), f(6), [1, 1, 1], [1, 1, 1], [1, 1, 1], 2)),),
    "conv_transpose2d.input": (
        S(lambda n: (f(n, 4, 5, 6), f(4, 3, 3, 3), f(3), [2, 2], [1, 1], [1, 1])),
        S(lambda n: (f(n, 4, 5, 6), f(4, 2, 3, 3), f(4), [1, 1], [0, 0], [0, 0], 2, [2, 2])),
    ),
    "embedding": (S(lambda n: (f(11, 6), i(11, n, 4)), (1,)),),
    "scaled_dot_product_attention": (
        S(lambda n: (f(n, 4, 7, 8), f(n, 4, 9, 8), f(n, 4, 9, 5)), (0, 1, 2)),
        S(lambda n: (f(n, 2, 7, 8), f(n, 2, 7, 8), f(n, 2, 7, 8), None, 0.0, True), (0, 1, 2)),
        S(lambda n: (f(n, 2, 5, 8), f(n, 2, 6, 8), f(n, 2, 6, 8), b(5, 6) | torch.eye(5, 6).bool()), (0, 1, 2)),
        S(lambda n: (f(n, 4, 5, 8), f(n, 2, 5, 8), f(n, 2, 5, 8)), (0, 1, 2), (("enable_gqa", True), ("scale", 0.3))),
    ),
    # norms
    "batch_norm": (S(lambda n: (f(n, 4, 3, 3), positive(4), f(4), f(4), positive(4), False, 0.1, 1e-5, False)),),
    "layer_norm": (
        S(lambda n: (f(n, 5, 16), [16], f(16), f(16))),
        S(lambda n: (f(n, 4, 6), [4, 6])),
        S(lambda n: (f(n, 3, 37) + 5, [37], None, f(37))),
        S(lambda n: (f(n, 130), [130], f(130), f(130), 1e-3)),
    ),
    "group_norm": (S(lambda n: (f(n, 6, 5, 5), 3, f(6), f(6))),),
    "instance_norm": (S(lambda n: (f(n, 4, 6, 6), f(4), f(4), None, None, True, 0.1, 1e-5, False)),),
    "rms_norm": (
        S(lambda n: (f(n, 5, 12), [12], f(12))),
        S(lambda n: (f(n, 12), [12], None, 1e-6)),
        S(lambda n: (f(n, 2, 99), [99], f(99))),
    ),
    "linalg_vector_norm": (
        S(lambda n: (f(n, 5, 3), 2, [1])),
        S(lambda n: (f(n, 5), 1, [1], True)),
        S(lambda n: (f(n, 5), float("inf"), [1])),
    ),
    "_weight_norm": (S(lambda n: (f(2, 5, 3), positive(1, 5, 1), 1), fixed_batch=True),),
    # reductions and along one dim
    "mean.dim": (S(lambda n: (f(n, 4, 5), [1, 2])), S(lambda n: (f(n, 4, 5), [-1], True))),
    "mean": (S(lambda n: (f(n, 4),)),),
    "sum.dim_IntList": (S(lambda n: (f(n, 4, 5), [1])), S(lambda n: (b(n, 4), [1]))),
    "sum": (S(lambda n: (i(9, n, 4),)),),
    "max.dim": (S(lambda n: (f(n, 6), 1)), S(lambda n: (f(n, 6, 2), 1, True))),
    "amax": (S(lambda n: (f(n, 4, 5), [1, 2])),),
    "amin": (S(lambda n: (f(n, 4, 5), [-1], True)),),
    "argmax": (S(lambda n: (f(n, 7), 1)),),
    "var.correction": (
        S(lambda n: (f(n, 6), [1]), options=(("correction", 1),)),
        S(lambda n: (f(n, 6), [1]), options=(("correction", 0), ("keepdim", True))),
    ),
    "softmax.int": (S(lambda n: (f(n, 4, 9) * 4, -1)), S(lambda n: (f(n, 4, 9), 1))),
    "log_softmax.int": (S(lambda n: (f(n, 9), -1)),),
    "cumsum": (S(lambda n: (f(n, 6), 1)), S(lambda n: (b(n, 6), 1))),
    "roll": (S(lambda n: (f(n, 6, 6, 3), [2, -1], [1, 2])), S(lambda n: (f(n, 5), [1], [1]))),
    "topk": (S(lambda n: (f(n, 9), 4)), S(lambda n: (f(n, 9), 2, 1, False))),
    "sort": (S(lambda n: (f(n, 8), 1)), S(lambda n: (f(n, 8), 1, True))),
    "flip": (S(lambda n: (f(n, 4, 5), [1, 2])),),
    # windows
    "max_pool1d": (S(lambda n: (f(n, 3, 11), [3], [2], [1])),),
    "max_pool2d": (
        S(lambda n: (f(n, 3, 9, 10), [3, 3], [2, 2], [1, 1])),
        S(lambda n: (f(n, 3, 9, 10), [2, 3], [2, 2], [0, 1], [1, 1], True)),
    ),
    "max_pool3d": (S(lambda n: (f(n, 3, 5, 6, 7), [3, 2, 3], [2, 2, 1], [1, 0, 1])),),
    "avg_pool1d": (S(lambda n: (f(n, 3, 11), [3], [2], [1])),),
    "avg_pool2d": (
        S(lambda n: (f(n, 3, 9, 9), [3, 3], [2, 2], [1, 1])),
        S(lambda n: (f(n, 3, 9, 9), [3, 3], [2, 2], [1, 1], True, False)),
    ),
    "avg_pool3d": (S(lambda n: (f(n, 3, 5, 6, 7), [2, 2, 2], [2, 1, 2], [1, 0, 1], False, False)),),
    "adaptive_avg_pool1d": (S(lambda n: (f(n, 3, 12), [4])),),
    "adaptive_avg_pool2d": (
        S(lambda n: (f(n, 3, 7, 7), [1, 1])),
        S(lambda n: (f(n, 3, 8, 6), [4, 3])),
        S(lambda n: (f(n, 3, 7, 5), [3, 2])),
    ),
    "adaptive_avg_pool3d": (
        S(lambda n: (f(n, 3, 4, 5, 6), [1, 1, 1])),
        S(lambda n: (f(n, 3, 4, 6, 6), [2, 3, 3])),
    ),
    "upsample_nearest2d.vec": (
        S(lambda n: (f(n, 2, 4, 5), None, [2.0, 2.0])),
        S(lambda n: (f(n, 2, 4, 5), [7, 9], None)),
    ),
    "upsample_bilinear2d.vec": (
        S(lambda n: (f(n, 2, 4, 5), None, False, [2.0, 2.0])),
        S(lambda n: (f(n, 2, 4, 5), [9, 7], True, None)),
    ),
    "upsample_bicubic2d.vec": (
        S(lambda n: (f(n, 2, 4, 5), None, False, [2.0, 1.5])),
        S(lambda n: (f(n, 2, 7, 6), [5, 9], True, None)),
        S(lambda n: (f(n, 2, 7, 6), [3, 4], False, None)),
    ),
    "pixel_shuffle": (S(lambda n: (f(n, 8, 3, 4), 2)),),
    # moving, cutting, joining
    "reshape": (S(lambda n: (f(n, 4, 6), [-1, 8, 3])),),
    "transpose.int": (S(lambda n: (f(n, 4, 6), 1, 2)), S(lambda n: (f(n, 4, 6), -1, 0))),
    "permute": (S(lambda n: (f(n, 4, 6), [2, 0, 1])),),
    "t": (S(lambda n: (f(n, 4),)),),
    "unsqueeze": (S(lambda n: (f(n, 4), 1)), S(lambda n: (f(n, 4), -1))),
    "squeeze.dim": (S(lambda n: (f(n, 1, 4), 1)), S(lambda n: (f(n, 3, 4), 1))),
    "squeeze.dims": (S(lambda n: (f(n, 1, 4, 1), [1, 3])),),
    "expand": (S(lambda n: (f(n, 1, 4), [-1, 3, 4])),),
    "expand_as": (S(lambda n: (f(1, 4), f(n, 4)), (1,)),),
    "reshape_as": (S(lambda n: (f(n, 6), f(n, 2, 3)), (0, 1)),),
    "slice.Tensor": (
        S(lambda n: (f(n, 9), 1, 2, 7, 2)),
        S(lambda n: (f(n, 9), 1, -3, 2**63 - 1)),
        S(lambda n: (f(n, 9), 1, 5, 3)),
        S(lambda n: (f(n, 9), 1, 0, 99)),
    ),
    "cat": (S(lambda n: ([f(n, 3), f(n, 5)], 1), (0,)),),
    "stack": (S(lambda n: ([f(n, 3), f(n, 3)], 1), (0,)), S(lambda n: ([f(n, 3), f(n, 3)], -1), (0,))),
    "select.int": (S(lambda n: (f(n, 5, 3), 1, -1)), S(lambda n: (f(n, 5, 3), 1, 2))),
    "chunk": (S(lambda n: (f(n, 7), 3, 1)),),
    "glu": (S(lambda n: (f(n, 8), 1)),),
    "unbind.int": (S(lambda n: (f(n, 3, 4), 1)),),
    "pad": (
        S(lambda n: (f(n, 3, 5), [1, 2])),
        S(lambda n: (f(n, 3, 5), [2, 1], "reflect")),
        S(lambda n: (f(n, 3, 5), [2, 1], "replicate")),
        S(lambda n: (f(n, 3, 5), [2, 1], "circular")),
        S(lambda n: (f(n, 3, 5), [-1, 1, 1, -1], "constant", 2.0)),
    ),
    "constant_pad_nd": (S(lambda n: (i(5, n, 3), [1, 1], 7)),),
    "split_with_sizes": (S(lambda n: (f(n, 9), [2, 3, 4], 1)),),
    "split.Tensor": (S(lambda n: (f(n, 9), 4, 1)),),
    "repeat": (S(lambda n: (f(n, 3), [1, 2])), S(lambda n: (f(n, 3), [2, 1, 1]))),
    "repeat_interleave.self_int": (S(lambda n: (f(n, 3), 2, 1)),),
    **_same("tril triu", S(lambda n: (f(n, 5, 5),)), S(lambda n: (f(n, 4, 6), 1))),
    "slice_scatter": (S(lambda n: (f(n, 8), f(n, 3), 1, 2, 8, 2), (0, 1)),),
    "select_scatter": (S(lambda n: (f(n, 8, 3), f(n, 3), 1, -2), (0, 1)),),
    "index.Tensor": (
        S(lambda n: (f(n, 5, 6), [None, torch.tensor([0, -1, 3])])),
        S(lambda n: (f(7, 6), [i(7, n, 2)]), (1,)),
        S(lambda n: (f(n, 5, 6), [None, torch.tensor([0, 2]), torch.tensor([1, -2])])),
    ),
    "index_select": (S(lambda n: (f(n, 5), 1, torch.tensor([4, 0, 0]))),),
    "gather": (S(lambda n: (f(n, 5), 1, i(5, n, 3)), (0, 2)),),
    # made from sizes and constants
    **_same("zeros_like ones_like empty_like", S(lambda n: (f(n, 3),))),
    "full_like": (S(lambda n: (f(n, 3), 2.5)), S(lambda n: (f(n, 3), float("-inf")))),
    **_same("new_zeros new_ones", S(lambda n: (f(n, 3), [2, 4]))),
    "new_full": (S(lambda n: (f(n, 3), [2, 4], 3.0)),),
    # casts
    "to.dtype": (
        S(lambda n: (f(n, 4) * 5, torch.int64)),
        S(lambda n: (i(3, n, 4), torch.bool)),
        S(lambda n: (i(3, n, 4), torch.float32)),
    ),
    "to.device": (S(lambda n: (i(3, n, 4), torch.device("cpu"), torch.bool)),),
    "_to_copy": (S(lambda n: (f(n, 4) * 5,), options=(("dtype", torch.int32),)),),
    "to.dtype_layout": (S(lambda n: (f(n, 4) * 5,), options=(("dtype", torch.int32),)),),
    "type_as": (S(lambda n: (i(3, n, 4), f(2))),),
    # mode
    **_same("dropout feature_dropout alpha_dropout feature_alpha_dropout", S(lambda n: (f(n, 4, 3), 0.5, False))),
    # mcc's formats
    "mcc.fake_quantize": (
        S(lambda n: (f(n, 6), torch.tensor(0.05), torch.tensor(3, dtype=torch.int32), None, 0, 255)),
    ),
    "mcc.fake_quantize_per_token": (S(lambda n: (torch.cat((f(n, 3, 6), torch.zeros(n, 1, 6)), 1), 127)),),
    "mcc.quantize": (
        S(lambda n: (f(n, 6), torch.tensor(0.05), torch.tensor(3, dtype=torch.int32), None, 0, 255, torch.uint8)),
        S(lambda n: (f(n, 6, 2), positive(6) / 20, torch.zeros(6, dtype=torch.int32), 1, -127, 127, torch.int8)),
    ),
    "mcc.dequantize": (
        S(lambda n: (i(256, n, 6).to(torch.uint8), torch.tensor(0.05), torch.tensor(9, dtype=torch.int32), None)),
    ),
    "mcc.decode_codebook": (
        S(lambda n: (i(16, n, 12).to(torch.int8) - 8, positive(n, 3), f(16, 1)), (0, 1)),
        S(lambda n: (i(4, n, 6).to(torch.int8) - 2, positive(n, 1), f(4, 2)), (0, 1)),
    ),
    "mcc.fake_codebook": (
        S(lambda n: (f(n, 12), positive(n, 3), f(16, 1).sort(0).values), (0, 1)),
        S(lambda n: (f(n, 12), positive(n, 1), f(4, 2)), (0, 1)),
    ),
    "mcc.token_scales": (S(lambda n: (f(n, 3, 12), 8, 1)), S(lambda n: (f(n, 2, 12), 4, 3))),
    "mcc.quantize_tokens": (
        S(lambda n: (f(n, 3, 12), positive(n, 3, 1) / 20, 8), (0, 1)),
        S(lambda n: (f(n, 2, 12), positive(n, 2, 3) / 2, 4), (0, 1)),
    ),
    "mcc.rescale": (
        S(lambda n: ((f(n, 6) * 1e6).round(), torch.tensor(0.00123), None, 0)),
        S(lambda n: ((f(n, 6, 2) * 99).round(), positive(6) / 20, 1, 8)),
        S(lambda n: (torch.tensor([1.0, 3, 5, -1, 1e6, -1e6]).repeat(n, 1), torch.tensor(0.5), None, 0)),
    ),
    "mcc.round_bfloat16": (
        S(lambda n: (f(n, 5, 7),)),
        S(lambda n: (torch.tensor([math.inf, -math.inf, -0.0, 1.00390625, 1.01171875, 3.4e38]).repeat(n, 1),)),
    ),
    "mcc.decode_bfloat16": (S(lambda n: (f(n, 5).to(torch.bfloat16).view(torch.int16),)),),
    "mcc.dequantize_tokens": (
        S(lambda n: (i(256, n, 3, 12).to(torch.int8), positive(n, 3, 1), 8), (0, 1)),
        S(lambda n: (i(256, n, 2, 6).to(torch.uint8), positive(n, 2, 3), 4), (0, 1)),
    ),
}

NOT_CALLED = {
    # integers and tuples inside a graph, and tensors made from nothing but constants: tested through whole modules
    "sym_size.int",
    "mul",
    "add",
    "sub",
    "mod",
    "floordiv",
    "sym_max",
    "sym_min",
    "getitem",
    "arange",
    "arange.start",
    "arange.start_step",
    "zeros",
    "ones",
    "full",
    "eye",
    "scalar_tensor",
    "mcc.decode_sparse",
    "mcc.decode_n_of_m",
    "mcc.unpack",
}
