"""Quantization: weights and activations of 8, 4, 3 or 2 bits, with ranges of activations from calibration data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.activation_quantizers import ActivationCodes, quantize_activations, round_activation, round_tokens
from mcc.attention_products import Attention, attentions, round_probabilities
from mcc.constants import varying
from mcc.cost import weight_expression
from mcc.errors import PassError, SpecError
from mcc.pairs import LARGEST, LARGEST_SUM, fit_pairs, reads_pairs
from mcc.quantization import (
    QUANTIZERS,
    ROUNDED,
    channel_scales,
    check_group_size,
    code_range,
    group_parameters,
    insert_quantizer,
    layer_weight,
    multiplying,
    new_quantizers,
    nodes_taken,
    power_of_two,
    ragged,
    round_weight,
)
from mcc.rewrite import Context, Lossy, Pass, Rewriter
from mcc.sensitivity import choose, damages
from mcc.statistics import OBSERVERS, Observer

if TYPE_CHECKING:
    from torch import fx

    from mcc.graph import Graph, Node
    from mcc.sensitivity import Formats
    from mcc.target import Target

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
ACTIVATION_BITS = {"int16": 16, **BITS}
BYTE, FLOAT = 8, 32  # bits
FEW = {"ternary": (-1, 1), "binary": (-1, 0)}  # codes
EMBEDDING_CODES = (-127, 127)
TOKEN_LIMIT = 127  # the largest code of a token, as `mcc.fake_quantize_per_token` and its kernels have it


@dataclass(frozen=True)
class Quantize(Pass):
    """Put fake-quantizers on the weights of linear and convolution layers and embeddings, and on what layers read.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %x_quantized: f32[8, 64] = mcc.fake_quantize(%x, @x_scale, @x_zero_point, axis=None, low=0, high=255)
        %fc_weight_quantized: f32[10, 64] = mcc.fake_quantize(@fc.weight, @fc.weight_scale, …, axis=0, low=-127,
        high=127)
        %fc: f32[8, 10] = linear(%x_quantized, %fc_weight_quantized, @fc.bias)

    Weights are symmetric with a scale for each output channel; activations affine with one scale, zero exact.
    Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
    2018. Where weights alone are quantized, those of linear layers may have a scale for each group of inputs,
        @fc.weight_scale: f16[10, 64 / group_size]
    chosen, as are all scales of fewer than 8 bits, for the least squared error of the weights. So may they where
    activations get a scale for each token when it comes, which linear layers alone can read:
        %x_quantized: f32[8, 64] = mcc.fake_quantize_per_token(%x, limit=127)
    "binary" weights are ±scale / 2, and `midpoints` are (code + 1/2) * scale: of four values none is zero then, and as
    many are positive as negative; @fc.weight_zero_point is -1/2. Liu et al.: ParetoQ: scaling laws in extremely low-bit
    LLM quantization. arXiv 2502.02631, 2025.
    Embeddings get int8 codes with a scale for each row; those tied to a layer have that layer's codes.
    With int8 activations attention multiplies codes too, where the target has an instruction that adds their products
    exactly; its probabilities become codes with a scale for each query:
        %y: f32[1, 2, 6, 16] = mcc.rounded_attention(%q_quantized, %k_quantized, %v_quantized)
    A model that spells attention out gets `mcc.fake_quantize_per_token(%probabilities, limit=255)` for it.

    Attributes:
        weights: "int8", "int4", "int3", "int2", "ternary" (-1, 0 and 1, stored in two bits) or "binary" (one bit),
            rounded to nearest; "auto" gives each layer one of int8 to int2, or leaves it in float, by what that does to
            `data.evaluate`; fewer than 8 bits where they are stored as such: in linear layers whose activations are
            float or "dynamic".
        activations: "int8", "int4", "int3" or "int2" need calibration data; None quantizes weights alone. Codes of
            fewer bits are bytes all the same: they cost accuracy, which training wins back, and save no time on CPUs.
            "int16", symmetric over the whole range that calibration data has, is for layers that lose too much with 8
            bits; no CPU kernel reads such codes, layers compute in float with what they stand for.
            "dynamic" has int8 codes with a scale for each token (row), chosen when it comes; layers whose weights a
            pass before has quantized get such too.
        group_size: inputs of a linear layer that share a scale, a multiple of 32; None for all. Needs activations that
            are None or "dynamic".
        symmetric: False gives each group of a linear layer a zero point. Needs the same.
        midpoints: codes stand for halves, none for zero: linear layers alone can read them. Needs the same.
        observer: how the range of an activation is chosen: "min-max"; "moving-average" of the batches' ranges;
            "percentile-99.9", "-99.99", "-99.999" leave outliers out; "mse" has the least squared error, "entropy" the
            least Kullback-Leibler divergence.
        weight_range: "target" keeps codes within what the target's fast int8 kernel adds exactly: ±127 with VNNI, on
            AVX2 pairs of neighbours within 128 (`mcc.pairs`), and ±63 where no inputs are neighbours; "halved" is ±63
            on AVX2 for all; "full" is ±127 everywhere.
        scales: "power-of-two" for targets that shift instead of multiplying; they are the nearest in squared error, of
            activations the next above, which leaves nothing out. Needs weights that are symmetric.
        max_drop: of the metric, which "auto" weights may cost: what `data.evaluate` gives, in its own units. What
            activations in codes cost comes on top.
        include: patterns of layer names to quantize, shell style.
        exclude: patterns of layer names to leave in float.
    """

    weights: Literal["int8", "int4", "int3", "int2", "ternary", "binary", "auto"] = "int8"
    activations: Literal["int16", "int8", "int4", "int3", "int2", "dynamic"] | None = "int8"
    group_size: int | None = None
    symmetric: bool = True
    midpoints: bool = False
    observer: Observer = "mse"
    weight_range: Literal["target", "halved", "full"] = "target"
    scales: Literal["any", "power-of-two"] = "any"
    max_drop: float = 0.005
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        for option, allowed in (
            ("weights", (*BITS, *FEW, "auto")), ("activations", (*ACTIVATION_BITS, "dynamic", None)),
            ("observer", OBSERVERS),
            ("weight_range", ("target", "halved", "full")), ("scales", ("any", "power-of-two")),
        ):  # fmt: skip
            if getattr(self, option) not in allowed:
                raise SpecError(
                    f"quantize: {option}={getattr(self, option)!r}",
                    remedy=f"use one of {', '.join(map(repr, allowed))}",
                )
        check_group_size("quantize", self.group_size)
        if not isinstance(self.max_drop, int | float) or math.isnan(self.max_drop):
            raise SpecError(f"quantize: max_drop={self.max_drop!r}", remedy="give a number")
        if self._static and (self.group_size is not None or not self.symmetric or self._halves):
            raise SpecError(
                "quantize: integer sums need one scale and no zero point for each output",
                remedy="leave group_size, symmetric, midpoints and binary weights out, or use activations=None or "
                "'dynamic'",
            )
        if self.midpoints and self.weights == "ternary":
            raise SpecError("quantize: midpoints of three codes", remedy="leave midpoints out, or use int2 or binary")
        if self.scales == "power-of-two" and (not self.symmetric or self._halves or self.activations == "dynamic"):
            raise SpecError(
                "quantize: scales of powers of two are those of symmetric weights and stored activations",
                remedy="leave symmetric=False, midpoints, binary weights and dynamic activations out",
            )
        if self._halves and not self.symmetric:
            raise SpecError("quantize: midpoints have one zero point", remedy="leave symmetric=False out")

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Activation ranges come from calibration data, formats of "auto" weights from the metric."""
        return (("calibration",) if self._static else ()) + (("evaluate",) if self.weights == "auto" else ())

    def run(self, graph: Graph, context: Context) -> Graph:
        """Quantize weights, then observe the graph with quantized weights and quantize activations."""
        self._check_patterns(graph)
        inputs = varying(graph)
        attended = self._attended(graph, inputs, context.target)
        found = [attention for attention, reason in attended.items() if reason is None]
        reasons = {n.fx: reason for attention, reason in attended.items() for n in (attention.scores, attention.node)}
        products = [n for n in multiplying(graph) if reasons.get(n.fx, "") is not None]
        layers = nodes_taken(products, context, lambda node: reasons.get(node.fx) or self._refusal(node))
        if self.weights == "auto":
            layers = self._quantize_mixed(graph, layers, context)
        else:
            self._quantize_all(graph, layers, context)
        if self.activations == "dynamic":
            _quantize_tokens(graph, layers)
        elif self.activations is not None and layers:
            reads = [(node, x) for node in layers if (x := node.operand(0)) is not None and x.fx in inputs]
            reads += [read for attention in found for read in attention.reads]
            quantize_activations(graph, reads, self._activation_codes, context.data.calibration or ())
            for attention in found:
                attention.round_probabilities()
                context.edited()
        return graph

    def _attended(self, graph: Graph, inputs: set[fx.Node], target: Target) -> dict[Attention, str | None]:
        """Attention with the reason why it stays in float, or None where its products are to be of codes."""
        if self.activations != "int8":
            return {}
        refused = {a: self._attention_refusal(a, inputs, target) for a in attentions(graph)}
        return {a: None if reason is None else f"attention stays in float: {reason}" for a, reason in refused.items()}

    def _attention_refusal(self, attention: Attention, inputs: set[fx.Node], target: Target) -> str | None:
        """Why products of queries and keys, and of probabilities and values, are not to be of codes, or None."""
        query, key, value = attention.query, attention.key, attention.value
        if (excluded := self._excluded(attention.node)) is not None:
            return excluded
        if not target.exact_dot4:
            return f"{target} multiplies floats as fast as codes of activations"
        if any(x.dtype is not torch.float32 for x in (query, key, value)):
            return "it does not compute in float32"
        if any(x.op in (*QUANTIZERS, ops.DEQUANTIZE_TOKENS) for x in (query, key, value)):
            return "its operands are quantized already"
        if any(x.fx not in inputs for x in (query, key, value)):
            return "one of its operands is stored"
        if attention.keeps_cache:
            return "its keys and values are kept, quantize-kv-cache stores them in codes"
        if not isinstance(query.shape[-1], int) or query.shape[-1] % 4 or value.shape[-1] < target.vector_lanes:
            return f"no kernel reads codes of {query.shape[-1]} by {value.shape[-1]} elements"
        if isinstance(query.shape[-2], int) and query.shape[-2] == 1:
            return "its single query reads each key once"
        return (
            "its probabilities are dropped"
            if attention.node.op is ops.ATTENTION and attention.node.argument(4)
            else None
        )

    @property
    def _activation_codes(self) -> ActivationCodes:
        assert self.activations is not None
        bits = ACTIVATION_BITS[self.activations]
        low, high = code_range(bits) if bits > BYTE else (0, (1 << bits) - 1)
        return ActivationCodes(low, high, self.observer, self.scales == "power-of-two")

    def _quantize_all(self, graph: Graph, layers: list[Node], context: Context) -> None:
        self.quantize_weights(layers, context)
        # the layers come first: an embedding that is tied to one reads what that reads
        embeddings = nodes_taken(_embeddings(graph), context, self._embedding_refusal)
        for node in embeddings:
            self._quantize_weight(node, EMBEDDING_CODES)
            context.edited()
        if not layers and not embeddings:
            raise self._nothing(context)

    def _nothing(self, context: Context) -> PassError:
        return PassError(
            f"{self}: there is no layer to quantize: {context.reasons}", remedy="change the options, or leave it out"
        )

    def candidates(self, graph: Graph) -> dict[str, Node]:
        """The layers and embeddings that "auto" weights would give a format, by name."""
        taken = {n.layer: n for n in _embeddings(graph) if self._embedding_refusal(n) is None}
        fresh = (n for n in graph.nodes if n.op in ops.LAYERS and not _has_quantizer(n) and self._refusal(n) is None)
        return taken | {n.layer: n for n in fresh}

    def in_formats(self, graph: Graph, formats: Formats, context: Context) -> Graph:
        """The graph, edited: the weights of some candidates in formats of their own."""
        found = {name: node for name, node in self.candidates(graph).items() if name in formats}
        for kind in dict.fromkeys(formats.values()):
            named = [n.layer for n in found.values() if n.op in ops.LAYERS and formats[n.layer] == kind]
            same = [n for n in graph.nodes if n.op in ops.LAYERS and n.layer in named]
            replace(self, weights=kind).quantize_weights(same, context)  # type: ignore[arg-type]  # a key of BITS
        for node in _embeddings(graph):
            if node.layer in formats and self._embedding_refusal(node) is None:
                self._quantize_weight(node, EMBEDDING_CODES)
                context.edited()
        return graph

    def quantize_weights(self, layers: list[Node], context: Context) -> None:
        """Put quantizers on the weights of layers that this pass takes; one that has some is noted."""
        plain = [n for n in layers if not _has_quantizer(n) and not (self._grouped and n.op is ops.LINEAR)]
        codes = self._codes(context) if plain else (0, 0)
        for node in layers:
            if _has_quantizer(node):
                context.note(f"{node.layer}: its weight is quantized already, its activations are now")
            elif self._grouped and node.op is ops.LINEAR:
                self._quantize_groups(node)
            else:
                self._quantize_weight(node, codes, pairs=self._in_pairs(node, context))
            context.edited()

    def _in_pairs(self, node: Node, context: Context) -> bool:
        """Whether neighbouring codes of a layer's weight share the range that its kernel adds exactly."""
        narrow = context.target.int8_weight_limit < LARGEST
        return self._pairs and narrow and self._in_integers and reads_pairs(node)

    @property
    def _pairs(self) -> bool:
        """Whether neighbouring codes share their range where the target needs it."""
        return self.weight_range == "target" and self.weights == "int8" and self.scales == "any"

    @property
    def _in_integers(self) -> bool:
        """Whether kernels multiply codes of weights with codes of activations."""
        return self.activations not in (None, "int16")

    def _quantize_weight(self, node: Node, codes: tuple[int, int], *, pairs: bool = False) -> None:
        name, weight = layer_weight(node)
        axis = 1 if node.op is ops.CONV_TRANSPOSE2D else 0
        codes = (-LARGEST, LARGEST) if pairs else codes

        def parameters() -> tuple[Tensor, Tensor]:
            if pairs:
                scales, fitted = fit_pairs(weight)
                node.graph.set_tensor(name, torch.where(fitted == weight, node.graph.tensor(name).detach(), fitted))
                return scales, torch.zeros(scales.shape, dtype=torch.int32)
            scales = channel_scales(weight, axis, codes)
            scales = self._allowed(weight.movedim(axis, 0).flatten(1), scales, codes)
            return scales, torch.zeros(scales.shape, dtype=torch.int32)

        insert_quantizer(node, name, parameters, axis, codes)

    def _allowed(self, values: Tensor, scale: Tensor, codes: tuple[int, int]) -> Tensor:
        """The scales, or the powers of two that are to stand for them."""
        return power_of_two(values, scale, codes) if self.scales == "power-of-two" else scale

    def _quantize_mixed(self, graph: Graph, layers: list[Node], context: Context) -> list[Node]:
        """Give each layer and embedding the format that its measured damage allows; returns layers that have one."""
        tried = Context(context.target, context.data, context.seed)

        def measure(formats: Formats) -> float:
            return context.data.measure(self.in_formats(graph.copy(), formats, tried).clean())

        older, candidates = [n for n in layers if _has_quantizer(n)], self.candidates(graph)
        if not older and not candidates:
            raise self._nothing(context)
        base = measure({})
        found = damages(measure, base, {name: self._savings(n) for name, n in candidates.items()}, context.progress)
        chosen = choose(measure, base - self.max_drop, found, context.progress)
        self.in_formats(graph, chosen, context)
        self.quantize_weights(older, context)
        for name, node in candidates.items():
            if name in chosen:
                context.note(f"{name}: {chosen[name]}")
            else:
                context.decline(
                    node, f"float: with it in any format, the metric would drop by more than {self.max_drop:g}"
                )
        for node in _embeddings(graph):
            if node.layer not in candidates and (reason := self._embedding_refusal(node)) is not None:
                context.decline(node, reason)
        return older + [n for n in layers if n.layer in chosen]

    def _savings(self, node: Node) -> dict[str, int]:
        """Bytes that each format saves which a kernel reads as it is."""
        expression = weight_expression(node.weight_operand)
        assert expression is not None
        packed = node.op is ops.LINEAR and not self._static
        formats = BITS if packed else {"int8": BITS["int8"]}
        return {kind: expression.elements * (FLOAT - bits) // 8 for kind, bits in formats.items()}

    @property
    def _static(self) -> bool:
        """Whether activations have stored scales."""
        return self.activations not in (None, "dynamic")

    @property
    def _halves(self) -> bool:
        """Whether no code stands for zero."""
        return self.midpoints or self.weights == "binary"

    @property
    def _grouped(self) -> bool:
        """Whether linear layers get scales for groups, one group where no size is given."""
        alone = (
            self.weights not in ("int8", "auto") or self.group_size is not None or not self.symmetric or self.midpoints
        )
        return not self._static and alone

    @property
    def _range(self) -> tuple[int, int]:
        """The least and the largest code of a weight in groups."""
        return FEW[self.weights] if self.weights in FEW else code_range(BITS[self.weights])

    def _quantize_groups(self, node: Node) -> None:
        name, weight = layer_weight(node)
        groups = 1 if self.group_size is None else weight.shape[1] // self.group_size

        def parameters() -> tuple[Tensor, Tensor]:
            scale, zero = group_parameters(
                weight, groups, self._range, symmetric=self.symmetric, midpoints=self._halves
            )
            return self._allowed(weight.reshape(len(weight), groups, -1), scale, self._range), zero

        insert_quantizer(node, name, parameters, 0, self._range)

    def _codes(self, context: Context) -> tuple[int, int]:
        """The least and the largest code of a weight with one scale for each output."""
        low, high = self._range
        exact = context.target.int8_weight_limit
        # where floats are multiplied any code is exact
        if self._in_integers and self.weight_range != "full" and exact < high:
            which = f"of neighbours within {LARGEST_SUM} together, others " if self._pairs else ""
            context.note(
                f"weight codes {which}within ±{exact}: {context.target} has no instruction that adds ±127 exactly"
            )
            return -exact, exact
        # of 8 bits the least code is left out, so that each code has its negative; of few bits each code counts
        return (-high, high) if self.weights == "int8" else (low, high)

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with weights rounded in their tensors and activations rounded by plain ATen calls."""
        rounded = before.copy()
        for node in new_quantizers(before, after):
            if node.op is ops.FAKE_QUANTIZE_PER_TOKEN:
                round_tokens(rounded, node)
            elif weight_expression(node) is not None:
                round_weight(rounded, node)
            else:
                round_activation(rounded, node)
        for node in after.nodes:
            if node.op is ops.ROUNDED_ATTENTION and (plain := rounded.node(node.name)).op is ops.ATTENTION:
                round_probabilities(plain)
        return rounded.clean()

    def _refusal(self, node: Node) -> str | None:
        """Why a layer is not taken, or None if it is."""
        if node.op not in ops.LAYERS:
            return f"{node.op} stays in float"
        expression = weight_expression(node.operand(1))
        if (excluded := self._excluded(node)) is not None:
            return excluded
        if expression is None:
            return "its weight is computed"
        if node.dtype is not torch.float32:
            return f"it computes in {str(node.dtype).removeprefix('torch.')}, not float32"
        if self.activations == "dynamic" and node.op is not ops.LINEAR:
            assert node.op is not None
            return f"{node.op.name} reads no activations with a scale for each token"
        if self._halves and node.op is not ops.LINEAR:
            return f"no kernel of {node.op} reads codes that stand for halves"
        if self._halves and expression.mask is not None:
            return "its pruned weights would not stay zero: no code stands for it"
        if expression.rounded is not None:
            return ROUNDED
        if expression.quantizer is not None:
            return None if self._only_activations(node) else "its weight is already quantized"
        return ragged(node, self.group_size) if self._grouped and node.op is ops.LINEAR else None

    def _excluded(self, node: Node) -> str | None:
        if not any(fnmatchcase(node.layer, p) for p in self.include):
            return "not included"
        pattern = next((p for p in self.exclude if fnmatchcase(node.layer, p)), None)
        return None if pattern is None else f"excluded by {pattern!r}"

    def _embedding_refusal(self, node: Node) -> str | None:
        """Why an embedding is not taken, or None if it is."""
        expression, top = weight_expression(node.weight_operand), node.weight_operand
        if (excluded := self._excluded(node)) is not None:
            return excluded
        if expression is None or top is None:
            return "its weight is computed"
        if node.dtype is not torch.float32:
            return f"its weight is {str(node.dtype).removeprefix('torch.')}, not float32"
        if expression.rounded is not None:
            return ROUNDED
        if expression.quantizer is not None:
            return "its weight is already quantized"
        tied = any(reader.op in ops.LAYERS for reader in top.users)
        return "its weight is tied to a layer that stays in float" if tied else None

    def _only_activations(self, node: Node) -> bool:
        """Whether a layer's weight is quantized by a pass before, and its activations are not."""
        source, expression = node.operand(0), weight_expression(node.operand(1))
        assert expression is not None
        by_pass = expression.quantizer is not None and expression.quantizer.op is ops.FAKE_QUANTIZE
        in_float = source is not None and source.op not in (ops.FAKE_QUANTIZE, ops.FAKE_QUANTIZE_PER_TOKEN)
        return self.activations == "dynamic" and by_pass and in_float

    def _check_patterns(self, graph: Graph) -> None:
        """Raise a PassError where a pattern matches nothing."""
        attending = [attention.node for attention in attentions(graph)]
        quantized = [n for n in graph.nodes if n.op in (*ops.LAYERS, ops.EMBEDDING)] + attending
        names = sorted({n.layer for n in quantized})
        for pattern in (*self.include, *self.exclude):
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
                raise PassError(
                    f"{self}: pattern {pattern!r} matches no layer",
                    remedy=f"layers that can be quantized: {', '.join(names) or 'none'}",
                )


def _embeddings(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op is ops.EMBEDDING]


def _has_quantizer(node: Node) -> bool:
    expression = weight_expression(node.operand(1))
    return expression is not None and expression.quantizer is not None


def _quantize_tokens(graph: Graph, layers: list[Node]) -> None:
    """Let layers read their input rounded row by row; those that read one value share it."""
    made: dict[str, Node] = {}
    for node in layers:
        x = node.operand(0)
        assert x is not None
        if x.name not in made:
            made[x.name] = Rewriter(graph, node).call(ops.FAKE_QUANTIZE_PER_TOKEN, x, TOKEN_LIMIT)
            made[x.name].rename(f"{x.name}_quantized")
        node.fx.replace_input_with(x.fx, made[x.name].fx)
