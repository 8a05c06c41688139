"""The kernels of the CPU backend, the first that takes a region is used."""

from mcc.backends.cpu.kernels.conv2d import Conv2dFloat, Conv2dInt8
from mcc.backends.cpu.kernels.conv2d_bfloat16 import Conv2dBfloat16
from mcc.backends.cpu.kernels.dense import DenseFloat, DenseInt8
from mcc.backends.cpu.kernels.dense_bfloat16 import DenseBfloat16
from mcc.backends.cpu.kernels.dense_per_token import DensePerToken
from mcc.backends.cpu.kernels.depthwise import Depthwise
from mcc.backends.cpu.kernels.depthwise_int8 import DepthwiseInt8
from mcc.backends.cpu.kernels.low_bit import LowBitDense
from mcc.backends.cpu.kernels.low_bit_per_token import LowBitPerToken
from mcc.backends.cpu.kernels.sparse import SparseDense
from mcc.backends.cpu.kernels.sparse_blocks import SparseBlocks
from mcc.backends.cpu.kernels.sparse_codes import SparseCodes, SparsePerToken
from mcc.backends.cpu.kernels.sparse_codes_conv import SparseCodesConv2d
from mcc.backends.cpu.kernels.sparse_conv import DepthwisePlanes, SparseConv2d
from mcc.backends.cpu.kernels.sparse_n_of_m import SparseNofM
from mcc.backends.cpu.kernels.sparse_rows import SparseRows
from mcc.backends.cpu.kernels.sparse_slabs import SparseSlabs
from mcc.backends.kernel import Kernel, Region
from mcc.target import Target

KERNELS: tuple[Kernel, ...] = (
    SparseCodes(), SparsePerToken(), SparseRows(), SparseSlabs(), SparseDense(), SparseBlocks(), SparseNofM(),
    LowBitDense(), LowBitPerToken(), DenseInt8(), DensePerToken(), DenseBfloat16(), DenseFloat(),
    DepthwiseInt8(), Depthwise(), SparseConv2d(), DepthwisePlanes(), SparseCodesConv2d(), Conv2dInt8(),
    Conv2dBfloat16(), Conv2dFloat(),
)  # fmt: skip


def first_kernel(region: Region, target: Target) -> tuple[Kernel | None, str]:
    """The kernel that a region gets; or None, and why each refuses it."""
    reasons = []
    for kernel in (k for k in KERNELS if k.anchor is region.anchor.op):
        reason = kernel.refuses(region, target)
        if reason is None:
            return kernel, ""
        reasons.append(f"{kernel.name}: {reason}")
    return None, "; ".join(reasons)
