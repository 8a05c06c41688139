"""The op table: the one place that knows an op.

A row names an op as ATen does (`.default` left out), its family, which arguments are weights, its MACs, and how it
behaves in training. Ops of one family couple their dims by one rule, so the coupling analysis keys its rules by
family. Backends keep their lowering in tables keyed by the same names. A graph holds no op outside this table.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Callable

Family = Literal[
    "weights", "contraction", "norm", "pointwise", "reduction", "along", "window",
    "recurrent", "move", "cut", "index", "make", "cast", "mode", "size", "compression",
]  # fmt: skip


def extent(size: int | torch.SymInt) -> int:
    """A dim as a plain int; a symbolic one by its value in the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The node's shape, symbolic dims by their value in the example inputs."""
    return tuple(extent(s) for s in node.meta["val"].shape)


def _no_macs(_node: fx.Node) -> int:
    return 0


def _operand(node: fx.Node, position: int) -> fx.Node:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def _linear_macs(node: fx.Node) -> int:
    return math.prod(shape_of(node)) * shape_of(_operand(node, 1))[-1]


def _conv_macs(node: fx.Node) -> int:
    return math.prod(shape_of(node)) * math.prod(shape_of(_operand(node, 1))[1:])


def _conv_transpose_macs(node: fx.Node) -> int:
    return math.prod(shape_of(_operand(node, 0))) * math.prod(shape_of(_operand(node, 1))[1:])


def _matmul_macs(node: fx.Node) -> int:
    return math.prod(shape_of(node)) * shape_of(_operand(node, 0))[-1]


def _addmm_macs(node: fx.Node) -> int:
    return math.prod(shape_of(node)) * shape_of(_operand(node, 1))[-1]


def _attention_macs(node: fx.Node) -> int:
    query, key, value = (shape_of(_operand(node, i)) for i in range(3))
    return math.prod(query) * key[-2] + math.prod(query[:-1]) * math.prod(value[-2:])


def _tokens_attention_macs(node: fx.Node) -> int:
    first = node.args[6]
    assert isinstance(first, list)
    query, key, value = (shape_of(_operand(node, i)) for i in range(3))
    tokens = key[1] if first[1] else key[2]
    return math.prod(query) * tokens + math.prod(query[:-1]) * tokens * value[-1]


def _recurrent_macs(node: fx.Node) -> int:
    return math.prod(shape_of(_operand(node, 0))) * shape_of(_operand(node, 1))[-1]


@dataclass(frozen=True, eq=False)
class Op:
    """A row of the op table.

    Attributes:
        name: the ATen name, `.default` left out; `mcc.…` for mcc's own; a bare verb for arithmetic on sizes.
        family: ops of one family couple their dims by the same rule.
        weights: positions of the arguments that hold weights.
        macs: multiply-accumulates of one call at the example shapes.
        train_flag: position of the argument that says "training", or None.
        commutes: whether the first two arguments may be swapped.
    """

    name: str
    family: Family
    weights: tuple[int, ...] = ()
    macs: Callable[[fx.Node], int] = _no_macs
    train_flag: int | None = None
    commutes: bool = False

    @property
    def target(self) -> Callable[..., object]:
        """What a graph node of this op calls."""
        if self.name in _PYTHON:
            return _PYTHON[self.name]
        library = torch.ops.mcc if self.name.startswith("mcc.") else torch.ops.aten
        packet, _, overload = self.name.removeprefix("mcc.").partition(".")
        target: Callable[..., object] = getattr(getattr(library, packet), overload or "default")
        return target

    def __str__(self) -> str:
        return self.name


_PYTHON: dict[str, Callable[..., object]] = {
    "getitem": operator.getitem,
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "mod": operator.mod,
    "floordiv": operator.floordiv,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}


def _rows(family: Family, names: str) -> tuple[Op, ...]:
    return tuple(Op(name, family) for name in names.split())


def _commuting(family: Family, names: str) -> tuple[Op, ...]:
    return tuple(Op(name, family, commutes=True) for name in names.split())


_TABLE = (
    # out dim = rows of the weight, in dim = columns; conv groups tie blocks of both
    Op("linear", "weights", weights=(1, 2), macs=_linear_macs),
    Op("conv1d", "weights", weights=(1, 2), macs=_conv_macs),
    Op("conv2d", "weights", weights=(1, 2), macs=_conv_macs),
    Op("conv3d", "weights", weights=(1, 2), macs=_conv_macs),
    Op("conv_transpose2d.input", "weights", weights=(1, 2), macs=_conv_transpose_macs),
    Op("embedding", "weights", weights=(0,)),
    # the contracted dims of both inputs are tied
    Op("addmm", "contraction", macs=_addmm_macs),
    Op("matmul", "contraction", macs=_matmul_macs),
    Op("bmm", "contraction", macs=_matmul_macs),
    Op("baddbmm", "contraction", macs=_addmm_macs),
    Op("scaled_dot_product_attention", "contraction", macs=_attention_macs),
    Op("mcc.grouped_matmul", "contraction", macs=_matmul_macs),
    Op("mcc.rounded_attention", "contraction", macs=_attention_macs),
    # the channel dim is tied to the vectors; layer_norm closes its dims
    Op("batch_norm", "norm", weights=(1, 2), train_flag=5),
    Op("layer_norm", "norm", weights=(2, 3)),
    Op("group_norm", "norm", weights=(2, 3)),
    Op("instance_norm", "norm", weights=(1, 2)),
    Op("rms_norm", "norm", weights=(2,)),
    *_rows("norm", "linalg_vector_norm _weight_norm"),
    # dims pass through, equal dims of several inputs are tied
    *_rows(
        "pointwise",
        "relu relu6 gelu silu mish neg abs exp log log1p sqrt rsqrt reciprocal sin cos tanh sigmoid hardsigmoid "
        "hardswish hardtanh leaky_relu elu selu celu softplus log_sigmoid erf sign ceil floor round square clamp "
        "clamp_min clamp_max pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor bitwise_not logical_not isnan trunc tan "
        "asin acos atan sinh cosh asinh acosh atanh atan2 exp2 log2 log10 expm1 erfc bitwise_and.Scalar "
        "bitwise_or.Scalar fmod.Tensor fmod.Scalar bitwise_xor.Scalar bitwise_left_shift.Tensor "
        "bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar "
        "sub.Tensor rsub.Scalar div.Tensor div.Tensor_mode floor_divide remainder.Scalar remainder.Tensor "
        "copy masked_fill.Scalar where.self where.ScalarOther where.ScalarSelf prelu "
        "le.Tensor le.Scalar lt.Tensor lt.Scalar ge.Tensor ge.Scalar gt.Tensor gt.Scalar eq.Scalar ne.Scalar",
    ),
    *_commuting(
        "pointwise",
        "add.Tensor mul.Tensor maximum minimum max.other min.other __and__.Tensor __or__.Tensor bitwise_and.Tensor "
        "bitwise_or.Tensor bitwise_xor.Tensor logical_and logical_or logical_xor eq.Tensor ne.Tensor",
    ),
    Op("glu", "cut"),
    # reduced dims end, others pass
    *_rows("reduction", "mean.dim mean sum.dim_IntList sum max.dim amax amin argmax var.correction prod.dim_int prod"),
    # dims pass, the worked dim is closed
    *_rows("along", "softmax.int log_softmax.int cumsum cumprod roll topk sort flip"),
    # channels pass, space is closed
    *_rows(
        "window",
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec pixel_shuffle",
    ),
    *_rows("move", "reshape transpose.int permute t unsqueeze squeeze.dim squeeze.dims expand expand_as reshape_as"),
    *_rows(
        "cut",
        "slice.Tensor cat select.int chunk unbind.int pad constant_pad_nd stack split_with_sizes split.Tensor repeat "
        "tril triu slice_scatter select_scatter repeat_interleave.self_int",
    ),
    *_rows("index", "index.Tensor index_select gather index_put scatter.src scatter.value scatter_add"),
    *_rows(
        "make",
        "arange arange.start arange.start_step zeros ones full eye zeros_like ones_like full_like empty_like new_zeros "
        "new_ones new_full scalar_tensor",
    ),
    *_rows("cast", "to.dtype to.device to.dtype_layout _to_copy type_as"),
    Op("dropout", "mode", train_flag=2),
    Op("feature_dropout", "mode", train_flag=2),
    Op("alpha_dropout", "mode", train_flag=2),
    Op("feature_alpha_dropout", "mode", train_flag=2),
    *_rows("size", "sym_size.int mul add sub mod floordiv sym_max sym_min"),
    Op("getitem", "size"),
    # one direction of a recurrent layer; the hidden dim is tied to itself, gate by gate
    Op("mcc.lstm", "recurrent", macs=_recurrent_macs),
    Op("mcc.gru", "recurrent", macs=_recurrent_macs),
    # as their NCHW forms, channels last: a backend's layout stage puts them in place of those
    Op("mcc.conv2d_nhwc", "weights", weights=(1, 2), macs=_conv_macs),
    Op("mcc.attention", "contraction", macs=_tokens_attention_macs),
    *_rows("window", "mcc.max_pool2d_nhwc mcc.avg_pool2d_nhwc mcc.upsample_nhwc"),
    Op("mcc.group_norm_nhwc", "norm", weights=(2, 3)),
    *_rows(
        "compression",
        "mcc.fake_quantize mcc.fake_quantize_per_token mcc.quantize mcc.dequantize mcc.decode_sparse mcc.decode_n_of_m "
        "mcc.unpack mcc.decode_codebook mcc.fake_codebook mcc.token_scales mcc.quantize_tokens "
        "mcc.dequantize_tokens mcc.round_bfloat16 mcc.decode_bfloat16 mcc.rescale",
    ),
)

OPS: dict[str, Op] = {row.name: row for row in _TABLE}

LINEAR, CONV1D, CONV2D, EMBEDDING = OPS["linear"], OPS["conv1d"], OPS["conv2d"], OPS["embedding"]
ATTENTION, ROUNDED_ATTENTION = OPS["scaled_dot_product_attention"], OPS["mcc.rounded_attention"]
ATTENTIONS = (ATTENTION, ROUNDED_ATTENTION)
CONV2D_NHWC = OPS["mcc.conv2d_nhwc"]
CONV3D, CONV_TRANSPOSE2D = OPS["conv3d"], OPS["conv_transpose2d.input"]
CONVOLUTIONS = (CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE2D)
LAYERS = (LINEAR, *CONVOLUTIONS)  # with weights that passes compress
BATCH_NORM, DROPOUT, FEATURE_DROPOUT = OPS["batch_norm"], OPS["dropout"], OPS["feature_dropout"]
ADD, MUL, RELU, RESHAPE = OPS["add.Tensor"], OPS["mul.Tensor"], OPS["relu"], OPS["reshape"]
RELU6, HARDTANH, CLAMP, CLAMP_MIN = OPS["relu6"], OPS["hardtanh"], OPS["clamp"], OPS["clamp_min"]
GETITEM, SYM_SIZE = OPS["getitem"], OPS["sym_size.int"]
FAKE_QUANTIZE, QUANTIZE = OPS["mcc.fake_quantize"], OPS["mcc.quantize"]
FAKE_QUANTIZE_PER_TOKEN = OPS["mcc.fake_quantize_per_token"]
QUANTIZE_TOKENS, DEQUANTIZE_TOKENS = OPS["mcc.quantize_tokens"], OPS["mcc.dequantize_tokens"]
FAKE_CODEBOOK, DECODE_CODEBOOK = OPS["mcc.fake_codebook"], OPS["mcc.decode_codebook"]
RESCALE = OPS["mcc.rescale"]
ROUND_BFLOAT16, DECODE_BFLOAT16 = OPS["mcc.round_bfloat16"], OPS["mcc.decode_bfloat16"]
DEQUANTIZE, UNPACK = OPS["mcc.dequantize"], OPS["mcc.unpack"]
DECODE_SPARSE, DECODE_N_OF_M = OPS["mcc.decode_sparse"], OPS["mcc.decode_n_of_m"]
WITHOUT_ZEROS = (DECODE_SPARSE, DECODE_N_OF_M)
RECURRENT = LSTM, GRU = OPS["mcc.lstm"], OPS["mcc.gru"]
# over weights that cannot be changed under them
FIXED = (DEQUANTIZE, *WITHOUT_ZEROS, FAKE_CODEBOOK, DECODE_CODEBOOK, DECODE_BFLOAT16)


def op_name(target: object) -> str:
    """The table's name for what a graph node calls, whether or not the table has it."""
    if target in _PYTHON_NAMES:
        return _PYTHON_NAMES[target]
    return str(target).removeprefix("aten.").removesuffix(".default")


def lookup(target: object) -> Op | None:
    """The row of what a graph node calls, or None."""
    return OPS.get(op_name(target))
