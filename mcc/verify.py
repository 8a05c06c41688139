"""Verification: does a graph, or the artifact made from it, compute what it promises?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import VerificationError
from mcc.frontend import in_eval_mode
from mcc.rewrite import Exact, Lossy, Pass, Within
from mcc.text import located_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mcc.graph import Graph

# Float32 networks of a hundred layers differ by a few 1e-6 of their largest output when sums are reordered; a wrong
# rewrite shows far above this.
ROUNDING = 1e-4
# A sum that rounds differently may flip a quantizer's step, and that step flips others further on. How much of the
# output's norm this moves is the model's own: it is judged by what a change of the parameters in their last digits
# does.
QUANTIZED_NORM = 1e-2
PASS_NORM = 1e-3  # of a pass, whose graphs run on one engine
PERTURBATION = 1e-5
# Some models make much of rounding, such as deep ones fed noise. What stays in float may differ by more than ROUNDING
# where a change of the parameters in about their last three bits moves it further.
LAST_BITS = 1e-6
_LARGEST_SAMPLED = 1e18
FLIPS_ALLOWED = 3.0


def sample_inputs(example: Sequence[Any], seed: int) -> tuple[Any, ...]:
    """Random inputs of the example's shapes, dtypes and ranges."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(_like(value, generator) for value in example)


def _like(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_like(v, generator) for v in value)
    if not isinstance(value, Tensor) or value.numel() == 0:
        return value
    if value.dtype is torch.bool:
        return torch.rand(value.shape, generator=generator) < value.float().mean()
    if value.is_floating_point() and not value.abs().max() < _LARGEST_SAMPLED:
        return value.clone()  # a mask of minus infinities has no mean to draw about
    low, high = value.min(), value.max()
    if not value.is_floating_point():
        return torch.randint(int(low), int(high) + 1, value.shape, generator=generator, dtype=value.dtype)
    noise = torch.randn(value.shape, generator=generator).to(value.dtype)
    deviation = value.std() if value.numel() > 1 else value.abs().max()
    return torch.clamp(value.mean() + deviation * noise, low, high)


def verify_capture(model: torch.nn.Module, graph: Graph, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Check that a captured graph computes what the model does in eval mode; the model is left as it was.

    Raises:
        VerificationError: naming the output and both values.
    """
    with in_eval_mode(model), torch.no_grad():
        # copies: some models write to their buffers and inputs
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        copies = pytree.tree_map_only(Tensor, torch.clone, (args, dict(named)))
        result = torch.func.functional_call(model, buffers, *copies)
    expected = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    with torch.no_grad():
        found = _outputs(graph, tuple(pytree.tree_leaves((args, named))))
    for name, e, f in zip(graph.signature.outputs, expected, found, strict=True):
        error, scale = _difference(e, f)
        if not error <= ROUNDING * scale:
            raise VerificationError(
                f"the captured graph differs from the model: output {name} {_values_text(e, f)}",
                pass_text="capture", node_name=name,
                remedy="its eval mode may be random, or depend on values; verify=False takes the captured graph as the "
                "model",
            )  # fmt: skip


def verify_encoding(graph: Graph, encoded: Graph, inputs: Iterable[tuple[Any, ...]]) -> None:
    """Check that an encoded graph computes what the compressed graph does.

    Raises:
        VerificationError: naming the output and both values.
    """
    for name, e, f, _, within in _compared(graph, lambda *sample: _outputs(encoded, sample), inputs, PASS_NORM):
        if not within:
            raise VerificationError(
                f"the encoded graph differs from the compressed one: output {name} {_values_text(e, f)}",
                pass_text="encode", node_name=name, remedy="this is a defect of mcc: please report it with the model",
            )  # fmt: skip


def verify_pass(step: Pass, before: Graph, after: Graph, inputs: Iterable[tuple[Any, ...]]) -> float | None:
    """Check a pass's guarantee on inputs of the new graph.

    Returns:
        the largest difference seen, relative to the largest output; None where the pass states no reference.

    Raises:
        VerificationError: naming the pass, the first node that differs, and both values.
    """
    guarantee = step.guarantee
    wanted = step.reference(before, after) if isinstance(guarantee, Lossy) else before
    _check_signature(step, wanted if step.changes_signature and wanted is not None else before, after)
    if wanted is None:
        return None
    rounds = _rounded_outputs(wanted)
    perturbed = _perturbed(wanted) if any(rounds) else wanted
    largest = 0.0
    with torch.no_grad():
        for sample in inputs:
            expected, found = _outputs(wanted, sample), _outputs(after, sample)
            flipped = expected if perturbed is wanted else _outputs(perturbed, sample)
            for i, (e, f, p) in enumerate(zip(expected, found, flipped, strict=True)):
                error, scale = _difference(e, f)
                apart, bound = _beside_flips(e, f, p, PASS_NORM) if rounds[i] else (error, ROUNDING * scale)
                if isinstance(guarantee, Within):
                    apart, bound = error, guarantee.atol + guarantee.rtol * scale
                if not apart <= bound:
                    raise _guilty(step, (wanted, perturbed, after), sample, after.signature.outputs[i])
                largest = max(largest, error / max(scale, 1e-30))
    return largest


def _rounded_outputs(graph: Graph) -> list[bool]:
    """Of each output, whether a sum before it that rounds differently may flip a quantizer's step."""
    rounded: set[fx.Node] = set()
    for node in graph.nodes:
        rounds = node.op in (ops.QUANTIZE, ops.QUANTIZE_TOKENS, ops.FAKE_QUANTIZE_PER_TOKEN) or (
            node.op in (ops.FAKE_QUANTIZE, ops.ROUND_BFLOAT16) and weight_expression(node) is None
        )
        if rounds or not rounded.isdisjoint(node.fx.all_input_nodes):
            rounded.add(node.fx)
    return [node.fx in rounded for node in graph.output_nodes if isinstance(node.value, Tensor)]


def _beside_flips(expected: Tensor, found: Tensor, flipped: Tensor, floor: float) -> tuple[float, float]:
    """How far two outputs are apart and may be where steps flip: norms, beside what a change of last digits does."""
    error, scale = _difference(expected, found)
    codes = expected.dtype in (torch.int8, torch.uint8)
    if not (codes or expected.is_floating_point()) or not math.isfinite(error):
        return error, ROUNDING * scale
    # what is not finite is so on both sides
    e, f, p = (t.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for t in (expected, found, flipped))
    return float((e - f).norm()), floor * max(float(e.norm()), 1e-6) + FLIPS_ALLOWED * float((e - p).norm())


def _check_signature(step: Pass, before: Graph, after: Graph) -> None:
    old, new = before.signature, after.signature
    if old.inputs != new.inputs or len(old.outputs) != len(new.outputs):
        raise VerificationError(
            f"{step} changed the graph's signature: inputs {', '.join(old.inputs)} to {', '.join(new.inputs)}, "
            f"{len(old.outputs)} outputs to {len(new.outputs)}",
            pass_text=str(step), node_name="output", remedy="a pass keeps inputs and outputs; mend the pass",
        )  # fmt: skip
    for b, a in zip(before.output_nodes, after.output_nodes, strict=True):
        if [str(s) for s in b.shape] != [str(s) for s in a.shape] or b.dtype is not a.dtype:
            raise VerificationError(
                f"{step} changed output {b.name} from {b.dtype} {list(b.shape)} to {a.dtype} {list(a.shape)}",
                pass_text=str(step), node_name=a.name, node=located_text(a), remedy="mend the pass",
            )  # fmt: skip


def _outputs(graph: Graph, sample: tuple[Any, ...]) -> list[Tensor]:
    # nested inputs come flattened: the interpreter takes them so
    outputs = fx.Interpreter(graph.module).run(*sample, enable_io_processing=False)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest absolute difference and largest absolute value; a NaN or infinity on one side alone is infinite.

    So is another shape or element type.
    """
    if expected.shape != found.shape or expected.dtype is not found.dtype:
        return float("inf"), 1.0
    if expected.numel() == 0:
        return 0.0, 1.0
    e, f = expected.detach().double(), found.detach().double()
    finite = e.isfinite()
    if not torch.equal(finite, f.isfinite()) or not torch.equal(e[~finite].nan_to_num(), f[~finite].nan_to_num()):
        return float("inf"), 1.0
    e, f = e[finite], f[finite]
    if e.numel() == 0:
        return 0.0, 1.0
    return float((e - f).abs().max()), max(float(e.abs().max()), 1e-6)


class _Values(fx.Interpreter):
    """Runs a graph and keeps every tensor that depends on its inputs, by node name: weights may differ on purpose."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self.values: dict[str, Tensor] = {}
        self._fed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" or not self._fed.isdisjoint(n.all_input_nodes):
            self._fed.add(n)
        if n.op == "call_function" and n in self._fed and isinstance(result, Tensor):
            self.values[n.name] = result.detach()
        return result


def _guilty(step: Pass, graphs: tuple[Graph, Graph, Graph], sample: tuple[Any, ...], output: str) -> VerificationError:
    """The error for a broken guarantee: the first node, in the new graph's order, whose value is off.

    Args:
        step: the pass.
        graphs: what it should give, that with parameters changed in their last digits, and what it gave.
        sample: inputs.
        output: the name of the output that is off.
    """
    old, flipped, new = (_Values(graph) for graph in graphs)
    for values in (old, flipped, new):
        values.run(*pytree.tree_leaves(sample))
    after = graphs[-1]
    name, expected, found = output, old.values.get(output), new.values.get(output)
    bound = max(step.guarantee.rtol, ROUNDING) if isinstance(step.guarantee, Within) else ROUNDING
    for candidate, value in new.values.items():
        other = old.values.get(candidate)
        if other is None or other.shape != value.shape:
            continue
        error, scale = _difference(other, value)
        apart, allowed = error, bound * scale
        if not apart <= allowed and graphs[1] is not graphs[0]:
            apart, allowed = _beside_flips(other, value, flipped.values.get(candidate, other), PASS_NORM)
        if not apart <= allowed:
            name, expected, found = candidate, other, value
            break
    promise = {Exact: "computes what it computed before", Within: f"stays within {step.guarantee}"}.get(
        type(step.guarantee), "computes what its reference computes"
    )
    return VerificationError(
        f"{step} broke its guarantee that the graph {promise}: %{name} {_values_text(expected, found)}",
        pass_text=str(step),
        node_name=name,
        node=located_text(after.node(name)),
        remedy="mend the pass; verify=False only hides it",
    )


def _values_text(expected: Tensor | None, found: Tensor | None) -> str:
    if expected is None or found is None:
        return "has no counterpart to compare with"
    if expected.shape != found.shape or expected.dtype is not found.dtype:
        return f"should be {expected.dtype} {list(expected.shape)} and is {found.dtype} {list(found.shape)}"
    flat_e, flat_f = expected.double().flatten(), found.double().flatten()
    worst = int((flat_e - flat_f).abs().nan_to_num(nan=float("inf")).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape)]
    return f"at {place} should be {float(flat_e[worst]):.6g} and is {float(flat_f[worst]):.6g}"


def _perturbed(graph: Graph, by: float = PERTURBATION) -> Graph:
    """A copy of the graph, its float parameters and the scales of its weights changed in their last digits."""
    generator = torch.Generator().manual_seed(0)
    changed = graph.copy()
    kept = (e.quantizer.operand(1) for n in changed.nodes if (e := weight_expression(n)) and e.quantizer)
    scales = [scale.tensor for scale in kept if scale is not None and scale.fx.op == "get_attr"]
    for parameter in {id(t): t for t in (*(p for _, p in changed.named_parameters()), *scales)}.values():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data = parameter.data * (1 + by * noise)
    return changed


def verify_artifact(graph: Graph, run: Callable[..., Any], inputs: Iterable[tuple[Any, ...]]) -> float:
    """Check that the lowered artifact computes what the graph does.

    A float graph must agree within float rounding, or what a change in the last bits does to it; where activations are
    quantized, rounding steps may flip, so the difference is judged by its norm, beside what flips when the parameters
    change in their last digits.

    Returns:
        the largest difference seen, relative to the largest output.

    Raises:
        VerificationError: naming the output and both values.
    """
    largest = 0.0
    for name, e, f, error, within in _compared(graph, run, inputs, QUANTIZED_NORM):
        if not within:
            raise VerificationError(
                f"the artifact differs from its graph: output {name} {_values_text(e, f)}", pass_text="build",
                node_name=name, node=located_text(graph.node(name)),
                remedy="this is a defect of the backend: please report it with the model",
            )  # fmt: skip
        largest = max(largest, error)
    return largest


def _compared(
    graph: Graph, run: Callable[..., Any], inputs: Iterable[tuple[Any, ...]], floor: float
) -> Iterator[tuple[str, Tensor, Tensor, float, bool]]:
    """Every output on every sample: its name, what it should be and is, how far that is apart, and if it may be so.

    Args:
        graph: what should be computed.
        run: what computes it.
        inputs: samples.
        floor: of outputs behind quantizers, the part of their norm that they may always be apart.
    """
    rounds = _rounded_outputs(graph)
    perturbed = _perturbed(graph) if any(rounds) else graph
    for sample in inputs:
        with torch.no_grad():
            expected = _outputs(graph, sample)
            flipped = expected if perturbed is graph else _outputs(perturbed, sample)
            found = [leaf for leaf in pytree.tree_leaves(run(*sample)) if isinstance(leaf, Tensor)]
        for i, (e, f, p) in enumerate(zip(expected, found, flipped, strict=True)):
            error, scale = _difference(e, f)
            apart, bound = _beside_flips(e, f, p, floor) if rounds[i] else (error, ROUNDING * scale)
            if not apart <= bound and not rounds[i]:
                bound = _moved(graph, sample, i, e)
            yield graph.signature.outputs[i], e, f, error / scale, apart <= bound


def _moved(graph: Graph, sample: tuple[Any, ...], output: int, expected: Tensor) -> float:
    """How far an output moves, at most, when parameters change in their last bits."""
    with torch.no_grad():
        moved, _ = _difference(expected, _outputs(_perturbed(graph, LAST_BITS), sample)[output])
    return moved if math.isfinite(moved) else 0.0
