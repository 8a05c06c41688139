"""The techniques: one file each, listed in PASSES."""

from mcc.passes.ada_round import AdaRound
from mcc.passes.awq import Awq
from mcc.passes.correct_bias import CorrectBias
from mcc.passes.eliminate_identity import EliminateIdentity
from mcc.passes.equalize_layers import EqualizeLayers
from mcc.passes.fine_tune import FineTune
from mcc.passes.fold_batch_norm import FoldBatchNorm
from mcc.passes.fold_constants import FoldConstants
from mcc.passes.gptq import Gptq
from mcc.passes.hqq import Hqq
from mcc.passes.integer_only import IntegerOnly
from mcc.passes.keep_zeros import KeepZeros
from mcc.passes.prune_blocks import PruneBlocks
from mcc.passes.prune_channels import PruneChannels
from mcc.passes.prune_heads import PruneHeads
from mcc.passes.prune_neurons import PruneNeurons
from mcc.passes.prune_weights import PruneWeights
from mcc.passes.quantize import Quantize
from mcc.passes.quantize_codebook import QuantizeCodebook
from mcc.passes.quantize_kv_cache import QuantizeKvCache
from mcc.passes.reconstruct import Reconstruct
from mcc.passes.reestimate_batch_norm import ReestimateBatchNorm
from mcc.passes.regularize_channels import RegularizeChannels
from mcc.passes.rigl import Rigl
from mcc.passes.round_bfloat16 import RoundBfloat16
from mcc.passes.smooth_quant import SmoothQuant
from mcc.passes.sparse_gpt import SparseGpt
from mcc.rewrite import Pass

PASSES: tuple[type[Pass], ...] = (
    EliminateIdentity, ReestimateBatchNorm, FoldBatchNorm, FoldConstants, KeepZeros, PruneWeights, Rigl, SparseGpt,
    RegularizeChannels, PruneChannels, PruneHeads, PruneNeurons, PruneBlocks, FineTune, EqualizeLayers, SmoothQuant,
    Awq, Gptq, Quantize, AdaRound, CorrectBias, Reconstruct, QuantizeKvCache, QuantizeCodebook, Hqq, RoundBfloat16,
    IntegerOnly,
)  # fmt: skip

__all__ = [
    "PASSES", "AdaRound", "Awq", "CorrectBias", "EliminateIdentity", "EqualizeLayers", "FineTune", "FoldBatchNorm",
    "FoldConstants", "Gptq", "Hqq", "IntegerOnly", "KeepZeros", "PruneBlocks", "PruneChannels", "PruneHeads",
    "PruneNeurons", "PruneWeights", "Quantize", "QuantizeCodebook", "QuantizeKvCache", "Reconstruct",
    "ReestimateBatchNorm", "RegularizeChannels", "Rigl", "RoundBfloat16", "SmoothQuant", "SparseGpt",
]  # fmt: skip
