"""Masks: patterns hold everywhere, ratios are met for every scope, equal scores go in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcc.errors import SpecError
from mcc.masks import Pattern, best_among, choose

RATIOS = st.floats(0.05, 0.95)


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.booleans())
def test_of_every_m_neighbours_n_stay_and_they_are_the_largest(rows, groups, among, convolution):
    n, m = among
    scores = torch.rand(rows, groups * m, *([3, 3] if convolution else []))
    mask = best_among(scores, n, m)
    parts = mask.unflatten(1, (groups, m)).movedim(2, -1)
    assert bool((parts.sum(-1) == n).all())
    values = scores.unflatten(1, (groups, m)).movedim(2, -1)
    assert bool((values.masked_fill(~parts, 9).amin(-1) >= values.masked_fill(parts, -9).amax(-1)).all())


@given(RATIOS, st.sampled_from(["global", "layer", "output", "erk"]))
def test_the_ratio_is_met_whatever_is_ranked_together(ratio, scope):
    scores = {"a": torch.rand(16, 40), "b": torch.rand(30, 8, 3, 3)}
    masks = choose(scores, ratio, scope, Pattern())
    total = sum(s.numel() for s in scores.values())
    gone = sum(int((~m).sum()) for m in masks.values())
    slack = {"output": sum(s.shape[0] for s in scores.values())}.get(scope, 2)
    assert abs(gone - ratio * total) <= slack
    if scope == "layer":
        assert all(int((~m).sum()) == round(ratio * m.numel()) for m in masks.values())
    if scope == "output":
        assert all(len(set(m.flatten(1).sum(1).tolist())) == 1 for m in masks.values())


def test_erk_leaves_small_layers_denser():
    scores = {"large": torch.rand(256, 256), "small": torch.rand(16, 16)}
    masks = choose(scores, 0.9, "erk", Pattern())
    densities = {name: float(mask.double().mean()) for name, mask in masks.items()}
    # (256 + 256) / 256^2 to (16 + 16) / 16^2 is 1 to 16; what would be above 1 is 1
    assert densities["small"] == 1
    assert densities["large"] == pytest.approx((0.1 * (65536 + 256) - 256) / 65536, abs=1e-3)


@given(RATIOS, st.sampled_from([(16, 1), (4, 4), (1, 4)]))
def test_blocks_go_whole(ratio, block):
    rows, columns = block
    mask = choose({"w": torch.rand(32, 20)}, ratio, "layer", Pattern(rows, columns))["w"]
    parts = mask.reshape(32 // rows, rows, 20 // columns, columns).float().mean((1, 3))
    assert bool(((parts == 0) | (parts == 1)).all())
    assert int(parts.sum()) == max(parts.numel() - round(ratio * parts.numel()), 1)


def test_no_layer_loses_everything_and_equal_scores_go_in_order():
    masks = choose({"a": torch.zeros(2, 2), "b": torch.ones(20, 20)}, 0.5, "global", Pattern())
    assert int(masks["a"].sum()) == 1
    assert choose({"a": torch.zeros(1, 4)}, 0.5, "layer", Pattern())["a"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(("text", "ratio", "message"), [
    ("3", 0.5, "use '' for single weights"), ("4:2", 0.5, "use ''"), ("0x4", 0.5, "use ''"),
    ("2:4", 0.9, r"its ratio is 0\.5"), ("1:4", 0.5, r"its ratio is 0\.75"),
])  # fmt: skip
def test_patterns_that_make_no_sense_are_refused(text, ratio, message):
    with pytest.raises(SpecError, match=message):
        Pattern.parse(text, ratio)


def test_shapes_that_a_pattern_does_not_fit_are_named():
    assert Pattern.parse("2:4", 0.5).misfit((8, 6)) == "its 6 inputs are no multiple of 4"
    assert Pattern.parse("16x1", 0.5).misfit((24, 6)) == "its 24 outputs are no multiple of 16"
    assert Pattern.parse("4x4", 0.5).misfit((8, 12, 3, 3)) is None
