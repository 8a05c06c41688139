"""Every row of the op table computes what PyTorch does, at several batch sizes of one artifact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_samples import NOT_CALLED, SAMPLES, Sample
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.axes import axes_of
from mcc.compiler import Options, compile_graph
from mcc.coupling import couple
from mcc.frontend import capture

QUICK = Options(verify=False, measure="never", tuning="model")
A_CHUNK = 10


def _chunks() -> dict[str, list[tuple[str, int]]]:
    """Samples of one family together, those of a fixed batch apart."""
    alike: dict[tuple[str, bool], list[tuple[str, int]]] = {}
    for name, samples in sorted(SAMPLES.items()):
        for k, sample in enumerate(samples):
            alike.setdefault((ops.OPS[name].family, sample.fixed_batch), []).append((name, k))
    return {
        f"{family}{' of a fixed batch' if fixed else ''} {start // A_CHUNK}": cases[start : start + A_CHUNK]
        for (family, fixed), cases in alike.items()
        for start in range(0, len(cases), A_CHUNK)
    }


CHUNKS = _chunks()


class OneCall(nn.Module):
    """Calls one op; tensors that are not inputs are its parameters and buffers."""

    def __init__(self, op: ops.Op, sample: Sample, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.sample = op, sample
        self.template = [None if i in sample.dynamic else a for i, a in enumerate(args)]
        leaves = pytree.tree_leaves(self.template)
        for k, leaf in enumerate(x for x in leaves if isinstance(x, Tensor)):
            if leaf.is_floating_point():
                self.register_parameter(f"stored_{k}", nn.Parameter(leaf, requires_grad=False))
            else:
                self.register_buffer(f"stored_{k}", leaf)

    def forward(self, *inputs: Any) -> Any:
        stored = iter(getattr(self, f"stored_{k}") for k in range(100) if hasattr(self, f"stored_{k}"))
        template = pytree.tree_map(lambda x: next(stored) if isinstance(x, Tensor) else x, self.template)
        given = iter(inputs)
        args = [next(given) if i in self.sample.dynamic else a for i, a in enumerate(template)]
        return self.op.target(*args, **dict(self.sample.options))


def test_every_row_has_a_sample():
    assert set(SAMPLES) | NOT_CALLED == set(ops.OPS)


def _dims(args: tuple[Any, ...], sample: Sample) -> Any:
    return (
        tuple([{0: "batch"}] * len(args[i]) if isinstance(args[i], list) else {0: "batch"} for i in sample.dynamic),
    )


class Calls(nn.Module):
    """Several calls, each with inputs of its own."""

    def __init__(self, calls: list[OneCall]) -> None:
        super().__init__()
        self.calls = nn.ModuleList(calls)

    def forward(self, *given: tuple[Any, ...]) -> Any:
        return [call(*inputs) for call, inputs in zip(self.calls, given, strict=True)]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ops_equal_pytorch(chunk: str):
    """Several at once: what takes time is to compile."""
    samples = [SAMPLES[name][k] for name, k in CHUNKS[chunk]]
    taken = [(s, s.args(2)) for s in samples]
    model = Calls([OneCall(ops.OPS[name], *pair) for (name, _), pair in zip(CHUNKS[chunk], taken, strict=True)])
    inputs = tuple(tuple(args[i] for i in s.dynamic) for s, args in taken)
    fixed = samples[0].fixed_batch
    graph = capture(model, inputs, dynamic_shapes=None if fixed else {"given": tuple(_dims(a, s)[0] for s, a in taken)})
    wanted = {ops.OPS[name] for name, _ in CHUNKS[chunk] if name not in ("reshape_as", "expand_as")}
    assert {o for o in wanted if o.family not in ("cast", "mode")} <= {n.op for n in graph.nodes}, str(graph)
    artifact = compile_graph(graph, tuple(pytree.tree_leaves(inputs)), (), QUICK)
    for batch in (2,) if fixed else (1, 3, 7):
        fresh = tuple(tuple(args[i] for i in s.dynamic) for s in samples for args in [s.args(batch)])
        with torch.no_grad():
            expected = model(*fresh)
        for _ in range(2):  # the second call of a shape goes straight to the kernels where all are kernels
            for (name, _), e, f in zip(CHUNKS[chunk], expected, artifact(*fresh), strict=True):
                _assert_alike(name, pytree.tree_leaves(e), pytree.tree_leaves(f))


def _assert_alike(name: str, expected: list[Tensor], found: list[Tensor]) -> None:
    assert len(expected) == len(found), name
    for e, f in zip(expected, found, strict=True):
        assert (e.shape, e.dtype) == (f.shape, f.dtype), name
        if name == "empty_like":
            continue
        if e.is_floating_point():
            torch.testing.assert_close(f, e, rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")
        else:
            assert torch.equal(f, e), name


@pytest.mark.parametrize(
    "name", ["linear", "conv2d", "conv1d", "matmul", "scaled_dot_product_attention", "conv_transpose2d.input"]
)
def test_macs_count_the_multiplications(name: str):
    """Against torch's own counter, which counts two operations a MAC."""
    from torch.utils.flop_counter import FlopCounterMode

    sample = SAMPLES[name][0]
    args = sample.args(2)
    module = OneCall(ops.OPS[name], sample, args)
    inputs = tuple(args[i] for i in sample.dynamic)
    graph = capture(module, inputs)
    counted = sum(n.op.macs(n.fx) for n in graph.nodes if n.op is not None)
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    assert counted == counter.get_total_flops() // 2


AS_IT_IS = {
    "index_put", "scatter.src", "scatter.value", "scatter_add", "mcc.grouped_matmul",
    "mcc.quantize", "mcc.dequantize", "mcc.decode_codebook", "mcc.fake_codebook", "mcc.token_scales",
    "mcc.quantize_tokens", "mcc.dequantize_tokens", "mcc.attention", "mcc.conv2d_nhwc", "mcc.max_pool2d_nhwc",
    "mcc.avg_pool2d_nhwc", "mcc.upsample_nhwc", "mcc.group_norm_nhwc", "mcc.decode_bfloat16",
    "mcc.rescale",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_rule_of_a_row_fits_the_sizes_of_its_calls(name: str):
    """No rule gives other sizes than the op; formats, what a backend makes and writes at computed places are taken as they are."""
    for sample in SAMPLES[name]:
        args = sample.args(2)
        inputs = tuple(args[i] for i in sample.dynamic)
        coupling = couple(capture(OneCall(ops.OPS[name], sample, args), inputs))
        terms = [t for dims in coupling.ties.dims.values() for t in pytree.tree_leaves(list(dims))]
        reasons = {r for t in terms for axis in axes_of(t) for r in axis.blocked}
        assert not any("does not expect" in r for r in reasons)
        assert any("as it is" in r for r in reasons) == (name in AS_IT_IS)
