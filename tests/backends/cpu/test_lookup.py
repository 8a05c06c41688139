"""Embeddings that read rows of stored codes, tied to a layer or by themselves: right answers, and each weight once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mcc
from mcc.data import Data
from mcc.errors import PassError
from mcc.passes import Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}
DIMS = ({0: "batch", 1: "length"},)
ROWS, WIDTH = 171, 96  # no multiple of a vector or a panel


class Language(nn.Module):
    """A model of tokens whose head is tied to its embedding, or is a layer of its own."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(ROWS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        rows = self.embed(ids)
        return self.head(self.norm(F.relu(self.mix(rows)))), rows


def quantized(model, ids, step):
    graph, _ = Pipeline((step,), parse_target("cpu"), Data()).run(
        mcc.capture(model, (ids,), dynamic_shapes=DIMS), (ids,)
    )
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize(("weights", "group_size", "symmetric"), [
    ("int8", None, True), ("int8", 32, False), ("int4", 32, True), ("int4", None, False), ("int3", 32, False),
    ("int3", 96, True), ("int2", 32, False),
])  # fmt: skip
def test_a_tied_embedding_reads_the_rows_of_its_layer(weights, group_size, symmetric, activations):
    torch.manual_seed(0)
    model, ids = Language(tied=True).eval(), torch.randint(0, ROWS, (3, 5))
    step = Quantize(weights=weights, activations=activations, group_size=group_size, symmetric=symmetric)
    artifact = mcc.compile(model, (ids,), passes=[step], dynamic_shapes=DIMS, **QUICK)
    graph = quantized(model, ids, step)
    every = torch.arange(ROWS).reshape(1, -1)
    for numbers in (ids, every, ids[:0], ids[:1, :1]):
        (logits, rows), (wanted, wanted_rows) = artifact(numbers), graph(numbers)
        torch.testing.assert_close(rows, wanted_rows)
        # codes of tokens that lie between two may fall to either side: a step of 127
        close = 1e-5 if activations is None else 0.02
        assert float((logits - wanted).norm()) <= close * float(wanted.norm())
    row = next(r for r in artifact.report.layers if r.op == "embedding")
    assert (row.kernel, row.stored, row.stored_bytes) == ("lookup", "that of head", 0)


def test_a_tied_embedding_in_float_is_stored_once():
    model, ids = Language(tied=True).eval(), torch.randint(0, ROWS, (3, 5))
    artifact = mcc.compile(model, (ids,), dynamic_shapes=DIMS, **QUICK)
    for found, wanted in zip(artifact(ids), model(ids), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert artifact.memory.weights < 1.2 * 4 * (ROWS * WIDTH + WIDTH * WIDTH)


@pytest.mark.parametrize(("weights", "group_size"), [("int8", None), ("int4", 32)])
def test_an_embedding_of_its_own_has_bytes(weights, group_size):
    torch.manual_seed(0)
    model, ids = Language(tied=False).eval(), torch.randint(0, ROWS, (2, 5))
    step = Quantize(weights=weights, activations=None, group_size=group_size)
    artifact = mcc.compile(model, (ids,), passes=[step], dynamic_shapes=DIMS, **QUICK)
    every = torch.arange(ROWS).reshape(1, -1)
    for found, wanted in zip(artifact(every), quantized(model, ids, step)(every), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    row = next(r for r in artifact.report.layers if r.op == "embedding")
    assert (row.kernel, row.stored, row.stored_bytes) == ("lookup", "int8", ROWS * (WIDTH + 4))


def test_patterns_name_embeddings_and_what_is_tied_to_them():
    model, ids = Language(tied=True).eval(), torch.randint(0, ROWS, (3, 5))
    step = Quantize(activations=None, exclude=("embed",))
    artifact = mcc.compile(model, (ids,), passes=[step], dynamic_shapes=DIMS, **QUICK)
    declined = [(d.layer, d.reason) for d in artifact.report.passes[1].declined]
    assert declined == [("embed", "excluded by 'embed'")] * 2  # the embedding, and the head that reads its weight
    with pytest.raises(PassError, match=r"pattern 'embedding' matches no layer"):
        mcc.compile(model, (ids,), passes=[Quantize(activations=None, exclude=("embedding",))], **QUICK)


def test_an_embedding_tied_to_a_layer_in_float_stays_in_float():
    model, ids = Language(tied=True).eval(), torch.randint(0, ROWS, (3, 5))
    step = Quantize(weights="int4", activations=None, group_size=64)  # which divides no 96 inputs
    with pytest.raises(PassError, match="its 96 inputs are no multiple of 64"):
        mcc.compile(model, (ids,), passes=[step], dynamic_shapes=DIMS, **QUICK)


def test_rows_at_known_places_are_read_from_codes_too():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.head = nn.Embedding(64, 48), nn.Linear(48, 8)
            self.register_buffer("ids", torch.arange(5))

        def forward(self, x):
            return self.head(x + self.places(self.ids))

    torch.manual_seed(0)
    model, x, step = Places().eval(), torch.randn(2, 5, 48), Quantize(activations=None)
    artifact = mcc.compile(model, (x,), passes=[step], **QUICK)
    graph, _ = Pipeline((step,), parse_target("cpu"), Data()).run(mcc.capture(model, (x,)), (x,))
    torch.testing.assert_close(artifact(x), graph(x), rtol=1e-4, atol=1e-5)
    row = next(r for r in artifact.report.layers if r.op == "embedding")
    assert (row.kernel, row.stored_bytes) == ("lookup", 64 * (48 + 4))


class Tables(nn.Module):
    """Two tables that one module owns, a third that is tied to two heads."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(50, WIDTH)), nn.Parameter(torch.randn(70, WIDTH))
        self.c = nn.Embedding(60, WIDTH)
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        x = F.embedding(ids, self.a) + F.embedding(ids, self.b) + self.c(ids)
        return F.gelu(F.linear(x, self.c.weight)), F.linear(self.scale(x), self.c.weight)


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_tables_of_one_module_are_told_apart_and_two_heads_share_one(activations):
    torch.manual_seed(0)
    model, ids, step = Tables().eval(), torch.randint(0, 50, (2, 6)), Quantize(activations=activations)
    artifact = mcc.compile(model, (ids,), passes=[step], dynamic_shapes=DIMS, **QUICK)
    graph = quantized(model, ids, step)
    for found, wanted in zip(artifact(ids), graph(ids), strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if activations is None else 0.02)
    stored = [r.stored_bytes for r in artifact.report.layers if r.op == "embedding"]
    assert sorted(stored) == [0, 50 * (WIDTH + 4), 70 * (WIDTH + 4)]


def test_a_model_of_nothing_but_an_embedding_is_quantized():
    model, ids, step = nn.Embedding(50, 32).eval(), torch.arange(50), Quantize(activations="dynamic")
    artifact = mcc.compile(model, (ids,), passes=[step], **QUICK)
    rounded = artifact(ids)
    assert 0 < float((rounded - model(ids)).abs().max()) <= float(model.weight.abs().max()) / 127
    assert artifact.memory.weights == 50 * (32 + 4)
