"""Key-value caches as codes: what the graph becomes, what it computes, what is not taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import FoldConstants, Quantize, QuantizeKvCache
from mcc.pipeline import Pipeline
from mcc.target import missing_features, parse_target
from mcc.token_formats import dequantize_tokens

SIZE, HEADS, KEY_HEADS = 32, 4, 2
TARGETS = [t for t in ("cpu:avx2", "cpu:avx512vnni") if not missing_features(parse_target(t))]
DYNAMIC = ({1: "tokens"}, [{2: "past"}], [{2: "past"}])


class Step(nn.Module):
    """A layer of a decoder: tokens, and keys and values of those before them."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, n * size) for n in (HEADS, KEY_HEADS, KEY_HEADS))

    def forward(self, x, keys, values):
        q, k, v = (f(x).unflatten(-1, (n, -1)).transpose(1, 2) for f, n in self.parts())
        k, v = torch.cat([keys[0], k], 2), torch.cat([values[0], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return y.transpose(1, 2).flatten(2), [k], [v]

    def parts(self):
        return (self.q, HEADS), (self.k, KEY_HEADS), (self.v, KEY_HEADS)


class Prompt(Step):
    """The same for the first tokens."""

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (n, -1)).transpose(1, 2) for f, n in self.parts())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), [k], [v]


def caches(batch, past, size=SIZE):
    return [[torch.randn(batch, KEY_HEADS, past, size)] for _ in range(2)]


def run(model, inputs, *steps, dynamic=None):
    graph = mcc.capture(model.eval(), inputs, dynamic_shapes=dynamic)
    flat = torch.utils._pytree.tree_leaves(inputs)
    return Pipeline(steps, parse_target("cpu:avx2"), Data()).run(graph, flat)


def test_the_cache_becomes_codes_and_scales(golden):
    graph, _ = run(Step(16), (torch.randn(1, 1, 24), *caches(1, 5, 16)), QuantizeKvCache(), dynamic=({}, *DYNAMIC[1:]))
    golden("quantized_kv_cache", str(graph))
    assert graph.signature.output_tree == ("reshape_3", [("cat_codes", "cat_scale")], [("cat_1_codes", "cat_1_scale")])


@pytest.mark.parametrize("step", [
    QuantizeKvCache(), QuantizeKvCache(group_size=8), QuantizeKvCache(4), QuantizeKvCache(4, 8),
], ids=str)  # fmt: skip
def test_codes_are_the_nearest_in_steps_of_the_largest_value(step):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 16) * 10
    x[0, 0, 0] = 0
    codes, scale = step.encode_cache(x)
    group, limit = step.group_size or 16, 127 if step.bits == 8 else 7
    assert scale.shape == (2, 3, 5, 16 // group)
    assert codes.shape == (2, 3, 5, 16 * step.bits // 8)
    wide = scale.double().repeat_interleave(group, -1)
    torch.testing.assert_close(wide * limit, x.double().unflatten(-1, (-1, group)).abs().amax(-1).repeat_interleave(
        group, -1).clamp_min(1e-35))  # fmt: skip
    error = (dequantize_tokens(codes, scale, step.bits).double() - x.double()).abs()
    assert (error <= wide * 0.5000001).all()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", [QuantizeKvCache(), QuantizeKvCache(4, 16), QuantizeKvCache(4)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_decoding_on_and_on_with_the_cache_in_codes(step, tokens, target):
    """Against the float model, whose cache is rounded by plain PyTorch at each call."""
    torch.manual_seed(0)
    model = Step().eval()
    artifact = mcc.compile(
        model, (torch.randn(2, tokens, 24), *caches(2, 6)), passes=[step], target=target, tuning="model",
        dynamic_shapes=({}, *DYNAMIC[1:]), measure="never",
    )  # fmt: skip
    kernel = "attention_step" if tokens == 1 else "attention"
    assert (kernel, f"int{step.bits} keys, values") in [(r.kernel, r.stored) for r in artifact.report.layers]
    keys, values = caches(2, 0)
    coded = [[step.encode_cache(c[0])] for c in (keys, values)]
    for _ in range(4):
        x = torch.randn(2, tokens, 24)
        found, *coded = artifact(x, *coded)
        with torch.no_grad():
            _, keys, values = model(x, keys, values)
            keys, values = ([dequantize_tokens(*step.encode_cache(c[0]), step.bits)] for c in (keys, values))
            q = model.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).double()
            wanted = F.scaled_dot_product_attention(q, keys[0].double(), values[0].double(), enable_gqa=True)
        torch.testing.assert_close(found.double(), wanted.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
        stored = dequantize_tokens(*coded[0][0], step.bits)
        assert (stored - keys[0]).norm() <= 1e-3 * keys[0].norm()


def test_a_prompts_cache_is_what_a_step_takes():
    torch.manual_seed(0)
    step, prompt = Step().eval(), Prompt().eval()
    prompt.load_state_dict(step.state_dict())
    x, nothing = torch.randn(1, 9, 24), {"measure": "never", "tuning": "model"}
    start = mcc.compile(prompt, (x,), passes="quantize-kv-cache", dynamic_shapes=DYNAMIC[:1], **nothing)
    on = mcc.compile(
        step, (x[:, :1], *caches(1, 5)), passes="quantize-kv-cache", dynamic_shapes=({}, *DYNAMIC[1:]), **nothing
    )
    y, *cache = start(x)
    with torch.no_grad():
        expected, *wanted = prompt(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)  # a prompt attends to its own floats
        for _ in range(3):
            found, *cache = on(x[:, :1], *cache)
            expected, *wanted = step(x[:, :1], *wanted)
            assert (found - expected).norm() <= 0.02 * expected.norm()
    assert cache[0][0][0].shape == (1, KEY_HEADS, 12, SIZE)


def test_groups_that_no_vector_fits_are_decoded_before_attention():
    model = Step(12).eval()
    for step in (QuantizeKvCache(4, 6), QuantizeKvCache(8, 3)):
        inputs = torch.randn(1, 4, 24), *caches(1, 5, 12)
        artifact = mcc.compile(model, inputs, passes=[step], target="cpu:avx2", tuning="model", measure="never")
        coded = ([step.encode_cache(c[0])] for c in inputs[1:])
        found, expected = artifact(inputs[0], *coded)[0], model(*inputs)[0]
        assert (found - expected).norm() <= (0.02 if step.bits == 8 else 0.3) * expected.norm()
        assert all(not row.stored.endswith("keys, values") for row in artifact.report.layers)


def test_it_follows_weights_of_few_bits_and_comes_after_what_calibrates():
    x = torch.randn(1, 1, 24), *caches(1, 5)
    weights = Quantize(weights="int4", activations="dynamic", group_size=None)
    graph, _ = run(Step(), x, weights, QuantizeKvCache(4))
    assert {"keys_0_codes", "keys_0_scale"} <= set(graph.signature.inputs)
    with pytest.raises(
        PassError, match=r"quantize needs data of the model.s inputs, and quantize-kv-cache changes those"
    ):
        mcc.compile(Step(), x, passes="quantize-kv-cache; quantize", data=Data(calibration=[x]))


class ReadTwice(Step):
    """The past is read beside the cache."""

    def forward(self, x, keys, values):
        y, k, v = super().forward(x, keys, values)
        return y + keys[0].mean(), k, v


class Other(Step):
    """Something else is kept of the past, as `keep` says."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x, past):
        q, n = (f(x).unflatten(-1, (h, -1)).transpose(1, 2) for f, h in self.parts()[:2])
        k = self.keep(past, n)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True), k


@pytest.mark.parametrize("keep", [
    lambda past, n: torch.cat([past[:, :, 1:], n], 2), lambda past, n: torch.cat([past, n], 2)[:, :, 1:],
    lambda past, n: torch.cat([past, n, n], 2), lambda past, n: torch.cat([n, past], 2),
    lambda past, n: torch.slice_scatter(past, n, 2, 4, 5),
])  # fmt: skip
def test_a_cache_that_rolls_is_left_alone_and_named(keep):
    with pytest.raises(PassError, match="it holds %past, but not with more tokens behind it"):
        run(Other(keep), (torch.randn(1, 1, 24), caches(1, 5)[0][0]), QuantizeKvCache())


class Features(nn.Module):
    """Attends to a value that it also asks with, and joins inputs that it does not attend to."""

    def forward(self, h, a, b):
        h = F.relu(h)
        return F.scaled_dot_product_attention(h, h, h), h, torch.cat([a, b], 1)


def test_values_that_are_no_cache_stay_what_they_are():
    images = torch.randn(1, 3, 8, 8)
    with pytest.raises(PassError, match="keeps no cache: there is none"):
        run(Features(), (torch.randn(1, 2, 5, 16), images, images), QuantizeKvCache())
    with pytest.raises(PassError, match="it is %past twice"):
        run(
            Other(lambda past, _: torch.cat([past, past], 2)),
            (torch.randn(1, 1, 24), caches(1, 5)[0][0]),
            QuantizeKvCache(),
        )
    with pytest.raises(PassError, match="keeps no cache"):
        run(Step(), (torch.randn(1, 1, 24), *caches(1, 5)), QuantizeKvCache(), QuantizeKvCache(4))


class SpelledOut(Step):
    """Attention as products and a softmax, with inputs of names that are taken."""

    def forward(self, x, k_codes, k):
        q, n = (f(x).unflatten(-1, (h, -1)).transpose(1, 2) for f, h in self.parts()[:2])
        k = torch.cat([k, n], 2)
        wide = k.repeat_interleave(HEADS // KEY_HEADS, 1)
        return torch.softmax(q @ wide.transpose(2, 3), -1) @ wide + k_codes, k


def test_attention_that_is_spelled_out_and_names_that_are_taken():
    model, step = SpelledOut().eval(), QuantizeKvCache()
    inputs = torch.randn(1, 1, 24), torch.randn(1), caches(1, 5)[0][0]
    graph, _ = run(model, inputs, step)
    assert graph.signature.inputs == ("x", "k_codes", "k_codes_1", "k_scale")
    artifact = mcc.compile(model, inputs, passes=[step], measure="never", tuning="model")
    found, expected = artifact(*inputs[:2], *step.encode_cache(inputs[2]))[0], model(*inputs)[0]
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_the_metric_is_left_out_where_it_can_no_longer_be_measured():
    x = torch.randn(1, 1, 24), *caches(1, 5)
    graph = mcc.capture(Step().eval(), x)
    data = Data(evaluate=lambda run: float(run(*x)[0].detach().mean()))
    steps = FoldConstants(), QuantizeKvCache(), FoldConstants()
    _, rows = Pipeline(steps, parse_target("cpu:avx2"), data).run(graph, torch.utils._pytree.tree_leaves(x))
    assert [row.metric is None for row in rows] == [False, False, True, True]
    assert "no longer what the model takes" in rows[2].notes[0]


def test_what_cannot_be_encoded_is_refused_in_words():
    for cache, step, message in (
        (torch.randn(1, 2, 3, 15), QuantizeKvCache(4), "15 elements cannot lie two in a byte"),
        (torch.randn(1, 2, 3, 16), QuantizeKvCache(group_size=5), "cannot be cut into groups of 5"),
        (torch.randn(1, 2, 3, 16).half(), QuantizeKvCache(), "a cache is a float32 tensor"),
    ):
        with pytest.raises(DataError, match=message):
            step.encode_cache(cache)


def test_what_is_not_taken_is_listed_with_the_reason():
    _, rows = run(ReadTwice(), (torch.randn(1, 1, 24), *caches(1, 5)), QuantizeKvCache())
    assert [row.reason for row in rows[1].declined] == ["its past %keys_0 is read by mean as well"]
    with pytest.raises(PassError, match=r"keeps no cache: there is none"):
        run(nn.Linear(3, 4), (torch.randn(2, 3),), QuantizeKvCache())
    with pytest.raises(PassError, match="32 elements cannot be cut into groups of 5"):
        run(Step(), (torch.randn(1, 1, 24), *caches(1, 5)), QuantizeKvCache(group_size=5))
    for text, message in (("bits=3", "bits=3"), ("group_size=0", "group_size=0")):
        with pytest.raises(SpecError, match=message):
            mcc.compile(nn.Linear(3, 4), (torch.randn(2, 3),), passes=f"quantize-kv-cache{{{text}}}")
