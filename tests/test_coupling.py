"""Coupling: a graph with indices removed equals the one with zeros there, for every op, and says what blocks the rest."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Attention, Branches, Shared, TiedLanguageModel
from programs import MAKERS, Program
from torch import nn
from torch.utils import _pytree as pytree

from mcc import ops
from mcc.coupling import couple
from mcc.errors import MccError
from mcc.frontend import capture
from mcc.surgery import keep, zeroed

STEPS = st.tuples(st.sampled_from(sorted(MAKERS.keys() - {"head"})), st.integers(0, 999))


def pruned(before, seed=0, share=1.0):
    """The graph with random indices removed from `share` of its open groups, and the one with zeros there."""
    rng = random.Random(seed)
    coupling = couple(before.copy())
    kept = {}
    for group in coupling.open_groups:
        count = rng.randint(1, group.size - 1)
        if rng.random() < share:
            kept[group.axis] = torch.tensor(sorted(rng.sample(range(group.size), count)))
    after = keep(coupling, kept)
    return after, zeroed(before, after), kept


def check_exact(model, inputs, seed=0, share=1.0, dynamic_shapes=None):
    """Remove at random; compare in float64 at 1e-9. Returns what was removed from."""
    before = capture(model, inputs, dynamic_shapes=dynamic_shapes)
    after, reference, kept = pruned(before, seed, share)
    with torch.no_grad():
        expected = pytree.tree_leaves(reference(*inputs))
        found = pytree.tree_leaves(after(*inputs))
    for e, f in zip(expected, found, strict=True):
        assert e.shape == f.shape
        torch.testing.assert_close(f, e, rtol=0, atol=1e-9 * max(float(e.abs().max()), 1.0), equal_nan=True)
    return kept


@settings(max_examples=60)
@given(st.lists(STEPS, min_size=1, max_size=8), st.booleans(), st.integers(0, 10**6))
def test_random_programs_are_exact(steps, image, seed):
    model = Program(steps, image=image, parameters=seed)
    check_exact(model, (model.example,), seed, share=0.8)


@pytest.mark.slow
@settings(max_examples=500)
@given(st.lists(STEPS, min_size=1, max_size=12), st.booleans(), st.integers(0, 10**6))
def test_five_hundred_random_programs_are_exact(steps, image, seed):
    model = Program(steps, image=image, parameters=seed)
    check_exact(model, (model.example,), seed, share=0.8)


def test_random_programs_lose_something():
    """The property above says something: of most programs of two layers something can go."""
    lost = 0
    for seed in range(20):
        model = Program(
            [("conv", seed), ("odd", seed), ("norm", seed), ("conv", seed + 1)], image=True, parameters=seed
        )
        lost += bool(check_exact(model, (model.example,), seed))
    assert lost > 15


def groups_text(model, inputs, **options):
    lines = []
    for g in couple(capture(model.eval(), inputs, **options)).groups:
        why = f": {g.blocked[0]}" if g.blocked else ""
        lines.append(f"{g.size} {g.kind} of {', '.join(g.layers)}{why}")
    return lines


def test_fused_queries_keys_and_values_have_heads_and_the_gate_its_halves():
    assert groups_text(Attention(), (torch.randn(2, 5, 32),)) == [
        "32 neuron of norm1, norm2, qkv, out, up, down: %x is an input",
        "3 neuron of qkv: unbind.int %unbind takes it apart",
        "4 head of qkv, out",
        "8 head dim of qkv, out",
        "64 neuron of up, down",
    ]


def test_a_tied_embedding_shrinks_in_width_only():
    assert groups_text(TiedLanguageModel(), (torch.randint(0, 50, (2, 5)),)) == [
        "50 neuron of embed: embedding %embed looks rows up",
        "16 neuron of embed, mix",
    ]


def test_a_layer_called_twice_ties_its_own_sides_and_inputs_and_outputs_block():
    assert groups_text(Shared(), (torch.randn(2, 12),)) == ["12 neuron of layer: %x is an input"]
    assert groups_text(Branches(), (torch.randn(2, 6), torch.randn(5))) == [
        "5 neuron of a, b: %a is returned",
        "5 neuron of b: %scale is an input",
    ]


class SharedKeys(nn.Module):
    """Two key heads of two query heads each; rotary embeddings from a stored table."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)
        self.register_buffer("frequencies", torch.rand(4))

    def rotated(self, x):
        angles = torch.arange(x.shape[2]).to(self.frequencies.dtype).unsqueeze(1) * self.frequencies
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (self.rotated(k), v))
        y = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def test_shared_keys_go_with_their_queries_and_rotations_with_their_frequencies():
    x = torch.randn(2, 5, 16)
    assert groups_text(SharedKeys(), (x,), dynamic_shapes=({0: "batch", 1: "length"},)) == [
        "2 head of q, k, v, o",
        "2 query head of q, o",
        "4 head dim of q, k, frequencies",
        "8 head dim of v, o",
        "16 neuron of o: %o is returned",
    ]
    check_exact(SharedKeys().double().eval(), (x.double(),), dynamic_shapes=({0: "batch", 1: "length"},))


class Dense(nn.Module):
    """Layers that read everything before them, joined; a zero-padded shortcut; channels of two sizes summed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1), nn.Conv2d(12, 17, 1)
        self.norm, self.d = nn.BatchNorm2d(17), nn.Conv2d(17, 2, 1)

    def forward(self, x):
        x = self.a(x).relu()
        x = torch.cat([x, self.b(x).relu()], 1)
        y = self.norm(self.c(x)) + F.pad(x, (0, 0, 0, 0, 2, 3))
        return self.d(y.relu())


def test_a_padded_shortcut_ties_the_middle_and_leaves_the_ends_free():
    x = torch.randn(2, 3, 6, 6)
    assert groups_text(Dense(), (x,)) == [
        "5 channel of a, b, c, norm, d",
        "7 channel of b, c, norm, d",
        "2 channel of c, norm, d",
        "3 channel of c, norm, d",
        "2 channel of d: %d is returned",
    ]
    before = capture(Dense().double().eval(), (x.double(),))
    after, _, _ = pruned(before)
    pad = next(n for n in after.nodes if n.op is ops.OPS["pad"])
    assert sum(pad.argument(1)) < 5
    check_exact(Dense().double().eval(), (x.double(),))


class NotZero(nn.Module):
    """Adds up what a removed channel would leave behind: sigmoid(0)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x).sigmoid()
        return self.b(y) * y.sum(-1, keepdim=True)


def test_a_sum_of_what_is_not_zero_blocks():
    assert groups_text(NotZero(), (torch.randn(2, 4),))[0] == (
        "6 neuron of a, b: sum.dim_IntList %sum_1 adds it up, and what would be removed is not zero"
    )


class Pairs(nn.Module):
    """A value against its own transpose: zero at a removed row, not at the removed column."""

    def __init__(self, way) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3)), way

    def forward(self, x):
        y = self.a(x)
        return self.way(y.unsqueeze(2), y.unsqueeze(1)).sum(-1) @ self.b


@pytest.mark.parametrize(("way", "goes"), [
    (lambda p, q: p - q, False), (lambda p, q: p / (1 + q * q), False), (torch.maximum, False),
    (lambda p, q: torch.where(p > q, p, q), False), (lambda p, q: p.masked_fill(q > 0, 0.0), False),
    (lambda p, q: (p - q).square(), False), (lambda p, q: p.expand_as(p * q), False), (lambda p, q: p * q, True),
])  # fmt: skip
def test_zeros_of_one_dim_are_none_of_another(way, goes):
    assert bool(check_exact(Pairs(way).double().eval(), (torch.randn(2, 4).double(),))) == goes


def test_an_instance_norm_by_running_statistics_gives_no_zeros():
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, track_running_stats=True)
            self.n.running_mean.normal_()

        def forward(self, x):
            return self.n(self.c(x)).sum(1)

    assert not check_exact(Normalized().double().eval(), (torch.randn(2, 3, 4, 4).double(),))


def test_a_squeeze_of_what_was_wide_leaves_what_became_one():
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x).squeeze(1).relu())

    before = capture(Squeezed().double().eval(), (torch.randn(2, 8).double(),))
    coupling = couple(before.copy())
    after = keep(coupling, {coupling.open_groups[0].axis: torch.tensor([2])})
    x = torch.randn(2, 8).double()
    torch.testing.assert_close(after(x), zeroed(before, after)(x))


def test_the_scores_of_narrower_heads_keep_their_scale():
    before = capture(SharedKeys().double().eval(), (torch.randn(2, 5, 16).double(),))
    coupling = couple(before.copy())
    depth = next(g for g in coupling.open_groups if g.kind == "head dim")
    after = keep(coupling, {depth.axis: torch.tensor([0, 2])})
    attention = next(n for n in after.nodes if n.op is ops.ATTENTION)
    assert attention.fx.kwargs["scale"] == 8**-0.5


def test_what_is_blocked_or_would_be_empty_is_refused():
    coupling = couple(capture(Attention().eval(), (torch.randn(2, 5, 32),)))
    with pytest.raises(MccError, match="nothing may be removed: %x is an input"):
        keep(coupling, {coupling.groups[0].axis: torch.tensor([0])})
    with pytest.raises(MccError, match="lose all its indices"):
        keep(coupling, {coupling.open_groups[0].axis: torch.tensor([], dtype=torch.int64)})
