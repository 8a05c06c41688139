"""Weights as codes of a table of values: NF4, FP4, or tables that k-means finds for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.codebooks import nearest_entries
from mcc.cost import weight_expression
from mcc.errors import SpecError
from mcc.graph import identifier
from mcc.quantization import (
    check_group_size,
    layer_weight,
    linear_layers_taken,
    ragged,
    reader_in_float,
    scale_dtype,
)
from mcc.rewrite import Context, Lossy, Pass, Rewriter

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

BITS = (2, 3, 4)  # of a code: a table of 16 entries fits registers
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, of the Open Compute Project's microscaling formats, 2023
SHRINKS = tuple(1.0 - 0.04 * i for i in range(13))  # of the scale under which the largest weight gets the largest entry
SAMPLE, ROUNDS = 1 << 17, 30  # vectors that k-means sees, and its steps
REFITS = 3  # of a table to the scales that were chosen for it


@dataclass(frozen=True)
class QuantizeCodebook(Pass):
    """Quantize the weights of linear layers to the entries of a table, times a scale for each group of inputs.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %fc_weight_quantized: f32[10, 64] = mcc.fake_codebook(@fc.weight, @fc.weight_scale, @fc.weight_table)
        %fc: f32[8, 10] = linear(%x, %fc_weight_quantized, @fc.bias)

    Scales have the least squared error of the weights. The kernel keeps the table in a register and looks codes up
    there. Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: efficient finetuning of quantized LLMs. NeurIPS 2023 (NF4);
    Gong, Liu, Yang, Bourdev: Compressing deep convolutional networks using vector quantization. arXiv 1412.6115, 2014
    (k-means, and vectors).

    Attributes:
        kind: "nf4", quantiles of the normal distribution; "fp4", floats of one bit of mantissa and two of exponent; or
            "k-means", a table for each layer.
        bits: of a code, 2 to 4; less than 4 with "k-means" alone.
        vector: neighbouring inputs that share a code, 1 or 2; 2 with "k-means" alone, and half the bits a weight.
        group_size: inputs that share a scale, a multiple of 32; None for all.
    """

    kind: Literal["nf4", "fp4", "k-means"] = "nf4"
    bits: int = 4
    vector: int = 1
    group_size: int | None = 64

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4", "k-means") or self.bits not in BITS or self.vector not in (1, 2):
            raise SpecError(
                f"quantize-codebook: kind={self.kind!r}, bits={self.bits}, vector={self.vector}",
                remedy="kinds are 'nf4', 'fp4' and 'k-means', bits 2 to 4, vectors 1 or 2",
            )
        if self.kind != "k-means" and (self.bits, self.vector) != (4, 1):
            raise SpecError(f"quantize-codebook: {self.kind} has 4 bits a weight", remedy="use kind='k-means'")
        check_group_size("quantize-codebook", self.group_size)
        if self.vector > 1 and self.bits == 3 and self.group_size is not None and self.group_size % 64:
            raise SpecError(
                f"quantize-codebook: no kernel reads pairs of 3 bits in groups of {self.group_size}",
                remedy="use a group_size of 64 or a multiple",
            )

    def run(self, graph: Graph, context: Context) -> Graph:
        """Quantize every linear layer."""
        for node in linear_layers_taken(self, graph, context, self._refusal):
            self._quantize(node, context.seed)
            context.edited()
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, reading weights that are rounded in their tensors entry by entry."""
        rounded = before.copy()
        known = {node.name for node in before.nodes}
        for node in after.nodes:
            if node.op is ops.FAKE_CODEBOOK and node.name not in known:
                expression, scale, table = weight_expression(node), node.operand(1), node.operand(2)
                assert expression is not None
                assert scale is not None
                assert table is not None
                values = _rounded(expression.values, scale.tensor.float(), table.tensor)
                rounded.set_tensor(str(expression.root.fx.target), values)
        return rounded.clean()

    def _refusal(self, node: Node) -> str | None:
        """Why a linear layer with a float weight is not taken, or None if it is."""
        expression = weight_expression(node.operand(1))
        assert expression is not None
        if expression.mask is not None and self.kind == "k-means":
            return "its pruned weights would not stay zero: no entry stands for it"
        if (reader := reader_in_float(node)) is not None:
            return f"its weight is read by {reader.op} as well"
        inputs = expression.root.tensor.shape[1]
        return f"its {inputs} inputs are no pairs" if inputs % self.vector else ragged(node, self.group_size)

    def _quantize(self, node: Node, seed: int) -> None:
        name, weight = layer_weight(node)
        size = self.group_size or weight.shape[1]
        grouped = weight.reshape(len(weight), -1, size)
        top = node.operand(1)
        assert top is not None
        shared = next((user for user in top.users if user.op is ops.FAKE_CODEBOOK), None)
        if shared is not None:
            node.fx.replace_input_with(top.fx, shared.fx)
            return
        largest = grouped.abs().amax(-1)
        full = torch.where(largest > torch.finfo(torch.float32).tiny, largest, 1.0)
        kind = scale_dtype(full, SHRINKS[-1])
        table = self._table(grouped / full[..., None], seed)
        scale = _least_error(grouped, full, table, kind)
        for _ in range(REFITS if self.kind == "k-means" else 0):
            table = k_means((grouped / scale[..., None]).reshape(-1, self.vector), 1 << self.bits, seed, table)
            scale = _least_error(grouped, full, table, kind)
        scale = scale.to(kind)
        rewriter = Rewriter(node.graph, node)
        operands = (rewriter.read(f"{name}_{part}", value) for part, value in (("scale", scale), ("table", table)))
        made = rewriter.call(ops.FAKE_CODEBOOK, top, *operands)
        made.rename(f"{identifier(name)}_quantized")
        node.fx.replace_input_with(top.fx, made.fx)

    def _table(self, scaled: Tensor, seed: int) -> Tensor:
        """Entries [2^bits, vector] for weights between -1 and 1."""
        if self.kind == "nf4":
            return normal_float()
        if self.kind == "fp4":
            half = torch.tensor(FP4) / FP4[-1]
            return torch.cat((-half.flip(0), half))[:, None]
        return k_means(scaled.reshape(-1, self.vector), 1 << self.bits, seed)


def normal_float() -> Tensor:
    """NF4, float32 [16, 1]: quantiles of the normal distribution, one of them zero, the outermost -1 and 1."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    return (values / values.max()).float()[:, None]


def k_means(vectors: Tensor, entries: int, seed: int, start: Tensor | None = None) -> Tensor:
    """Centres with a small mean squared distance from a sample of the vectors, by Lloyd's steps.

    Args:
        vectors: [count, size].
        entries: centres wanted.
        seed: of the sample.
        start: centres to start at; None for numbers at even distances, or for vectors of the sample.

    Returns:
        float32 [entries, size]; of numbers in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(vectors) > SAMPLE:
        vectors = vectors[torch.randint(len(vectors), (SAMPLE,), generator=generator)]
    vectors = vectors.float()
    if start is not None:
        centres = start
    elif vectors.shape[1] == 1:
        steps = torch.arange(1, 2 * entries, 2) / (2 * entries)
        low, high = vectors.min(), vectors.max()
        centres = (low + (high - low) * steps)[:, None]
    else:
        centres = vectors[torch.randperm(len(vectors), generator=generator)[:entries]]
        centres = torch.cat((centres, centres.new_zeros(entries - len(centres), vectors.shape[1])))
    for _ in range(ROUNDS):
        nearest = nearest_entries(vectors, centres)
        counts = torch.bincount(nearest, minlength=entries)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres.contiguous()


def _least_error(grouped: Tensor, full: Tensor, table: Tensor, kind: torch.dtype) -> Tensor:
    """Of scales shrunken from `full`, those whose groups [out, groups, size] have the least squared error.

    They are float32 numbers that `kind` can hold.
    """
    best, least = full.clone(), torch.full_like(full, float("inf"))
    for shrink in SHRINKS:
        scale = (full * shrink).to(kind).float()
        rounded = _rounded(grouped.flatten(1), scale, table).reshape(grouped.shape)
        error = (rounded - grouped).square().sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _rounded(weight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """A matrix with every vector of inputs replaced by the entry it is nearest to."""
    grouped = weight.reshape(*scale.shape, -1) / scale[..., None]
    entries = table[nearest_entries(grouped.reshape(-1, table.shape[1]), table)]
    return (entries.reshape(grouped.shape) * scale[..., None]).reshape(weight.shape)
