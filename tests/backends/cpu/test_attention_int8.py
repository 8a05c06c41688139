"""The kernel of attention over codes, against integers and float64; and the attention that it is called for."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulated import COMPILER, EMULATOR
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import TARGETS, run_function
from torch import nn

import mcc
from mcc.backends.cpu.kernels.attention import AttentionShape
from mcc.backends.cpu.kernels.attention_tiles import attention_int8_function
from mcc.backends.cpu.microkernel import Parameter, Vectors, kernel_function
from mcc.backends.cpu.vector_math import exp_to_codes
from mcc.target import missing_features, parse_target

QUICK = {"measure": "never", "tuning": "model"}
VNNI = pytest.mark.skipif("cpu:avx512vnni" not in map(str, TARGETS), reason="this CPU has no AVX-512 VNNI")
ARM = pytest.mark.skipif(COMPILER is None or EMULATOR is None, reason="no cross compiler and emulator for ARM here")
TILES = pytest.mark.skipif(bool(missing_features(parse_target("cpu:amx"))), reason="this CPU has no tile registers")
EXACT = [
    pytest.param("cpu:avx512vnni", marks=VNNI), pytest.param("cpu:neon", marks=ARM), pytest.param("cpu:amx", marks=TILES),
]  # fmt: skip
HIDDEN = -math.inf


@dataclass(frozen=True)
class Case:
    """Sizes and layouts of one attention."""

    rows: int = 9
    keys: int = 21
    depth: int = 24
    width: int = 20
    heads: int = 2
    key_heads: int = 2
    batch: int = 1
    tokens_first: tuple[bool, bool, bool, bool] = (True, True, True, True)
    causal: bool = False
    mask: str = ""
    zeros: tuple[int, int, int] = (128, 120, 131)
    limit: int = 255

    def dims(self, which: int, heads: int, tokens: int, size: int) -> tuple[int, ...]:
        """Dims of one of query, key, value and output."""
        first = self.tokens_first[which]
        return (self.batch, tokens, heads, size) if first else (self.batch, heads, tokens, size)


def codes_of(case: Case, seed: int = 0) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed)
    sizes = (
        (case.heads, case.rows, case.depth),
        (case.key_heads, case.keys, case.depth),
        (case.key_heads, case.keys, case.width),
    )
    return [drawn.integers(0, 256, case.dims(i, *size)).astype(np.uint8) for i, size in enumerate(sizes)]


def mask_of(case: Case) -> list[np.ndarray]:
    drawn = np.random.default_rng(5)
    if case.mask == "bool":
        seen = drawn.random((case.batch, 1, case.rows, case.keys)) < 0.7
        seen[:, :, 0] = False  # a query that sees no key
        return [seen]
    return [drawn.standard_normal((1, case.heads, 1, case.keys)).astype(np.float32)] if case.mask else []


SCALES = (0.02, 0.015, 0.03)


def run(case: Case, target: str, codes: list[np.ndarray]) -> np.ndarray:
    mask = mask_of(case)
    shape = AttentionShape(
        case.batch, case.heads, case.key_heads, case.rows, case.keys, case.depth, case.width, case.tokens_first,
        mask[0].shape if mask else None, case.mask, case.causal, case.depth**-0.5, limit=case.limit,
    )  # fmt: skip
    function = attention_int8_function(shape, parse_target(target))
    operands = [
        array
        for code, scale, zero in zip(codes, SCALES, case.zeros, strict=True)
        for array in (code, np.array(scale, np.float32), np.array(zero, np.int32))
    ]
    out = np.full(case.dims(3, case.heads, case.rows, case.width), 77, np.float32)
    named = function.with_attr("global_symbol", "attention_int8")
    (found,) = run_function(named, parse_target(target), [[*operands, *mask, out]])
    return found


def expected(case: Case, codes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """In float64, with exact sums of integers; and what the output moves by where one code of each row is another."""
    q, k, v = (
        (c.transpose(0, 2, 1, 3) if first else c).astype(np.int64) - zero
        for c, first, zero in zip(codes, case.tokens_first, case.zeros, strict=False)
    )
    k, v = (np.repeat(x, case.heads // case.key_heads, axis=1) for x in (k, v))
    scores = (q @ k.swapaxes(-2, -1)) * (SCALES[0] * SCALES[1] * case.depth**-0.5)
    for mask in mask_of(case):
        scores = np.where(mask, scores, HIDDEN) if mask.dtype == bool else scores + mask
    if case.causal:
        scores = np.where(np.tril(np.ones((case.rows, case.keys), bool)), scores, HIDDEN)
    top = scores.max(-1, keepdims=True)
    powers = np.where(np.isfinite(scores), np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    total = powers.sum(-1, keepdims=True)
    step = np.divide(SCALES[2] / case.limit, total, out=np.zeros_like(total), where=total > 0)
    result, one = np.rint(powers * case.limit).astype(np.int64) @ v * step, np.abs(v).max() * step
    return tuple(
        x.transpose(0, 2, 1, 3) if case.tokens_first[3] else x for x in (result, np.broadcast_to(one, result.shape))
    )


def check(case: Case, target: str) -> None:
    codes = codes_of(case)
    wanted, one = expected(case, codes)
    found = run(case, target, codes)
    # exp is within 1e-5: of 255 codes few lie so near the middle between two; one that does moves a whole row
    a_row = one.max() * case.width / one.size
    assert (np.abs(found - wanted) <= 2 * one + 1e-5).all()
    assert np.abs(found - wanted).mean() <= 0.02 * one.mean() + a_row + 1e-5


CASES = {
    "tokens first": Case(),
    "heads first": Case(tokens_first=(False, False, False, False)),
    "layouts that differ": Case(tokens_first=(True, False, True, False), batch=2),
    "one scale of signed codes": Case(zeros=(128, 128, 128)),
    "zero points at the ends": Case(zeros=(0, 255, 3)),
    "causal": Case(rows=21, causal=True),
    "causal with fewer keys": Case(rows=21, keys=5, causal=True),
    "added mask": Case(mask="float32"),
    "hidden keys": Case(mask="bool"),
    "grouped queries": Case(heads=6, key_heads=2, depth=64, width=64),
    "whole vectors": Case(rows=48, keys=64, depth=64, width=64),
    "one key": Case(keys=1),
    "few rows": Case(rows=2, keys=3, depth=4, width=16),
    "wide values": Case(width=150),
    "coarse": Case(limit=127),
    "blocks of tiles": Case(rows=75, keys=83, depth=40, width=40),
    "causal blocks of tiles": Case(rows=90, keys=90, depth=64, width=64, causal=True, mask="float32"),
}


@pytest.mark.parametrize("target", EXACT)
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_integers_give(name, target):
    check(CASES[name], target)


@given(
    st.builds(
        Case, rows=st.integers(1, 20), keys=st.integers(1, 40), depth=st.integers(1, 20).map(lambda n: 4 * n),
        width=st.integers(16, 50), heads=st.sampled_from((2, 4)), key_heads=st.sampled_from((1, 2)),
        batch=st.integers(1, 3), tokens_first=st.tuples(*[st.booleans()] * 4), causal=st.booleans(),
        mask=st.sampled_from(("", "bool", "float32")), zeros=st.tuples(*[st.integers(0, 255)] * 3),
    )
)  # fmt: skip
@pytest.mark.parametrize("target", [EXACT[0], EXACT[2]])
@settings(max_examples=15, deadline=None)
def test_any_sizes(target, case):
    check(case, target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_e_to_what_is_hidden_is_a_normal_number(target):
    """Others take a CPU a hundred cycles each, and there is one for every key that is not seen."""
    v = Vectors(target)

    def body(x, y):
        v.store(y, 0, exp_to_codes(v, v.load(x, 0)))

    parameters = [Parameter(name, (v.lanes,), "float32") for name in "XY"]
    x, out = np.full(v.lanes, HIDDEN, np.float32), np.zeros(v.lanes, np.float32)
    x[0], x[1] = 0.0, -86.6
    (found,) = run_function(kernel_function("e", parameters, body), target, [[x, out]])
    np.testing.assert_allclose(found[:2], np.exp(x[:2]), rtol=2e-5)
    assert (found >= np.finfo(np.float32).tiny).all()


@VNNI
def test_equal_scores_weigh_all_values_alike():
    case = Case(keys=37)
    codes = codes_of(case)
    codes[0][:] = case.zeros[0]
    mean = (codes[2].astype(np.float64) - case.zeros[2]).mean(1, keepdims=True) * SCALES[2]
    np.testing.assert_allclose(
        run(case, "cpu:avx512vnni", codes), np.broadcast_to(mean, (1, 9, 2, 20)), rtol=1e-5, atol=1e-6
    )


@VNNI
def test_a_query_that_one_key_answers_gets_its_value():
    case = Case(rows=4, keys=4, depth=4, width=16, zeros=(0, 0, 100))
    codes = codes_of(case)
    codes[0][:], codes[1][:] = 0, 0
    for token in range(4):
        codes[0][0, token, :, token] = codes[1][0, (token + 1) % 4, :, token] = 255
    values = np.roll(codes[2].astype(np.float64) - 100, -1, axis=1) * SCALES[2]
    np.testing.assert_allclose(
        run(case, "cpu:avx512vnni", codes), values, rtol=1e-3
    )  # the other three keys: e^-9.75 each


class Attend(nn.Module):
    """Projections around attention, which is spelled out or the op."""

    def __init__(self, how: str, heads: int = 4, depth: int = 16) -> None:
        super().__init__()
        self.how, self.heads = how, heads
        size = heads * depth
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(heads, 1, 1))

    def forward(self, x, mask=None):
        batch, tokens, size = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, size // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.how == "op":
            seen = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        elif self.how == "causal":
            seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.bias
            if self.how == "filled":
                later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, torch.finfo(torch.float32).min)
            seen = nn.functional.dropout(scores.softmax(-1), 0.1, self.training) @ v
        return self.out(seen.transpose(1, 2).reshape(batch, tokens, size))


def compiled(model: nn.Module, x: torch.Tensor, target: str, **options: object) -> mcc.Artifact:
    passes = options.pop("passes", "quantize")
    return mcc.compile(
        model, (x,), passes=passes, target=target, data=mcc.Data(calibration=[x]), verify=True, **QUICK, **options
    )


@VNNI
@pytest.mark.parametrize("how", ["op", "causal", "spelled out", "filled"])
def test_quantized_attention_multiplies_codes(how):
    torch.manual_seed(0)
    model, x = Attend(how).eval(), torch.randn(3, 21, 64)
    artifact = compiled(model, x, "cpu:avx512vnni", dynamic_shapes=({0: "batch", 1: "tokens"},))
    assert [row.kernel for row in artifact.report.layers if row.op == "attention"] == ["attention_int8"]
    for batch, tokens in ((3, 21), (1, 40), (7, 13), (0, 21)):
        other = torch.randn(batch, tokens, 64)
        with torch.no_grad():
            wanted = model(other)
        found = artifact(other)
        assert found.shape == wanted.shape
        assert float((found - wanted).norm()) <= 0.06 * float(wanted.norm())


@VNNI
def test_two_threads_attend_at_once():
    model, x = Attend("op").eval(), torch.randn(2, 33, 64)
    artifact = compiled(model, x, "cpu:avx512vnni")
    wanted = artifact(x)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(wanted, y) for y in pool.map(lambda _: artifact(x), range(20)))


class OneHead(nn.Module):
    """A stage of SegFormer: one head, keys of an image made smaller by a convolution."""

    def __init__(self):
        super().__init__()
        self.smaller = nn.Conv2d(32, 32, 2, 2)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        batch = x.shape[0]
        image = self.smaller(x.permute(0, 2, 1).reshape(batch, 32, 8, 8))
        y = image.reshape(batch, 32, -1).permute(0, 2, 1)
        q, k, v = (t.view(batch, -1, 1, 32).transpose(1, 2) for t in (self.query(x), self.key(y), self.value(y)))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, 32))


@VNNI
def test_one_head_between_convolutions_multiplies_codes():
    torch.manual_seed(0)
    model, x = OneHead().eval(), torch.randn(2, 64, 32)
    artifact = compiled(model, x, "cpu:avx512vnni")
    assert "attention_int8" in [row.kernel for row in artifact.report.layers]
    with torch.no_grad():
        assert float((artifact(x) - model(x)).norm()) <= 0.05 * float(model(x).norm())


class Latent(nn.Module):
    """Queries that are stored, as they are or as a view, or values that are."""

    def __init__(self, what):
        super().__init__()
        self.what, self.stored, self.out = what, nn.Parameter(torch.randn(2, 7, 16)), nn.Linear(16, 16)

    def forward(self, x):
        stored = self.stored.expand(3, 2, 7, 16) if self.what == "view" else self.stored[None]
        if self.what == "value":
            seen = nn.functional.scaled_dot_product_attention(x, x, stored.expand(3, 2, 7, 16))
        else:
            seen = nn.functional.scaled_dot_product_attention(stored.expand(3, 2, 7, 16), x, x)
        return self.out(seen)


@VNNI
@pytest.mark.parametrize("what", ["view", "tensor", "value"])
def test_attention_of_stored_tensors_stays_in_float(what):
    model, x = Latent(what).eval(), torch.randn(3, 2, 7, 16)
    artifact = compiled(model, x, "cpu:avx512vnni")
    assert "attention" in [row.kernel for row in artifact.report.layers]
    assert "one of its operands is stored" in str([d.reason for p in artifact.report.passes for d in p.declined])
    with torch.no_grad():
        assert float((artifact(x) - model(x)).norm()) <= 0.05 * float(model(x).norm())


def test_a_target_without_exact_sums_of_codes_keeps_attention_in_float():
    artifact = compiled(Attend("op").eval(), torch.randn(2, 9, 64), "cpu:avx2")
    (reason,) = [d.reason for p in artifact.report.passes for d in p.declined]
    assert reason.startswith("attention stays in float: cpu:avx2 multiplies floats as fast")
    assert [row.kernel for row in artifact.report.layers if row.op == "attention"] == ["attention"]


def test_rounded_probabilities_run_in_float_where_no_kernel_multiplies_codes():
    """What was quantized for one target, and is compiled for another."""

    class Rounded(nn.Module):
        def forward(self, q, k, v):
            return torch.ops.mcc.rounded_attention(q, k, v, limit=15)

    inputs = [torch.randn(2, 3, 7, 16) for _ in range(3)]
    artifact = mcc.compile(Rounded(), inputs, target="cpu:avx2", **QUICK)
    (row,) = artifact.report.layers
    assert (row.kernel, row.reason.partition(":")[0]) == ("attention", "computed in float between its quantizers")
    plain = nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(artifact(*inputs), Rounded()(*inputs), rtol=1e-4, atol=1e-5)
    assert float((plain - artifact(*inputs)).abs().max()) > 1e-3


def test_gradients_pass_through_the_rounding():
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float32, requires_grad=True) for _ in range(3))
    torch.ops.mcc.rounded_attention(q, k, v).square().sum().backward()
    rounded = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    nn.functional.scaled_dot_product_attention(q, k, v).square().sum().backward()
    for found, x in zip(rounded, (q, k, v), strict=True):
        assert float((found - x.grad).norm()) <= 0.05 * float(x.grad.norm())
