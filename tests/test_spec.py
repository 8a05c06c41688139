"""Passes as text: round trips, tokenizing, recipes, refusals."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from mcc.errors import SpecError
from mcc.passes import PASSES, FineTune, FoldBatchNorm, PruneWeights, Quantize
from mcc.rewrite import Pass
from mcc.spec import build_pass, kebab_case, parse_passes, read_recipe

KNOWN = {kind.pass_name(): kind for kind in PASSES}
SPECIAL = {
    ("PruneWeights", "ratio"): st.floats(0.01, 0.99),
    ("Quantize", "group_size"): st.sampled_from([None, 32, 128]),
    ("FineTune", "epochs"): st.integers(1, 50),
}


def _values(kind: type[Pass], field: dataclasses.Field) -> st.SearchStrategy:
    hint = get_type_hints(kind)[field.name]
    if (kind.__name__, field.name) in SPECIAL:
        return SPECIAL[kind.__name__, field.name]
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return st.sampled_from(options)
    if type(None) in options:
        literals = [v for o in options if get_origin(o) is Literal for v in get_args(o)]
        return st.sampled_from([*literals, None])
    text = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12)
    by_type = {
        str: text,
        bool: st.booleans(),
        float: st.floats(1e-6, 1.0),
        int: st.integers(1, 99),
        tuple[str, ...]: st.lists(text, max_size=3).map(tuple),
    }
    return by_type[hint]


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    kind = draw(st.sampled_from(PASSES))
    try:
        return kind(**{f.name: draw(_values(kind, f)) for f in dataclasses.fields(kind)})
    except SpecError:
        reject()  # options that exclude each other


@given(st.lists(passes(), max_size=4))
def test_parsing_a_printed_list_gives_equal_passes(steps):
    assert parse_passes("; ".join(map(str, steps)), KNOWN) == tuple(steps)
    assert parse_passes("; ".join(s.full_text() for s in steps), KNOWN) == tuple(steps)


def test_text_leaves_defaults_out_and_full_text_writes_them():
    step = PruneWeights(ratio=0.9)
    assert str(step) == "prune-weights{ratio=0.9}"
    assert step.full_text() == (
        "prune-weights{ratio=0.9, scope='global', saliency='magnitude', pattern='', schedule='one-shot', "
        "include=('*',), exclude=()}"
    )


def test_a_brace_or_semicolon_inside_a_string_is_part_of_it():
    text = "quantize{exclude=('a;b', '}')}; fold-batch-norm"
    assert parse_passes(text, KNOWN) == (Quantize(exclude=("a;b", "}")), FoldBatchNorm())


def test_lists_become_tuples_and_spaces_do_not_matter():
    assert parse_passes(" prune-weights { include = [ 'a' ] } ;", KNOWN) == (PruneWeights(include=("a",)),)


@pytest.mark.parametrize(
    ("name", "text"),
    [("FoldBatchNorm", "fold-batch-norm"), ("GPTQWeights", "gptq-weights"), ("Prune2To4", "prune2-to4")],
)
def test_a_pass_is_called_as_its_class(name, text):
    assert kebab_case(name) == text


@pytest.mark.parametrize(("text", "message"), [
    ("prune-wieghts", "unknown pass 'prune-wieghts'\n  remedy  did you mean prune-weights? known passes:"),
    ("quantize{bits=4}", "quantize has no option 'bits'\n  remedy  its options: weights, activations,"),
    ("prune-weights{ratio='x'}", "prune-weights: ratio='x' is not a float"),
    ("prune-weights{ratio=1.5}", "prune-weights: ratio=1.5\n  remedy  a fraction between 0 and 1"),
    ("fine-tune{epochs=True}", "fine-tune: epochs=True is not a int"),
    ("fine-tune{epochs=0}", "fine-tune: epochs=0"),
    ("quantize{weights='int5'}", "quantize: weights='int5'\n  remedy  use one of 'int8', 'int4', 'int3', 'int2'"),
    ("quantize{activations=int8}", "cannot read the options {activations=int8}"),
    ("quantize{'int8'}", "options need names"),
    ("quantize{weights='int8'", "no closing brace in"),
    ("quantize fold-batch-norm", "expected ';' before 'fold-batch-norm'"),
    ("; quantize", "expected a pass name at '; quantize'"),
])  # fmt: skip
def test_a_wrong_text_is_refused_in_words(text, message):
    with pytest.raises(SpecError) as caught:
        parse_passes(text, KNOWN)
    assert str(caught.value).startswith(message)


def test_a_needed_option_must_be_given():
    @dataclasses.dataclass(frozen=True)
    class Needs(Pass):
        bits: int

    with pytest.raises(SpecError, match="needs needs bits"):
        build_pass("needs", {}, {"needs": Needs})


def test_a_recipe_mixes_texts_and_mappings(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "- fold-batch-norm\n- prune-weights: {ratio: 0.5, exclude: [head]}\n- fine-tune{epochs=3}\n- quantize:\n"
    )
    assert read_recipe(path, KNOWN) == (
        FoldBatchNorm(),
        PruneWeights(exclude=("head",)),
        FineTune(epochs=3),
        Quantize(),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "cannot read the recipe"), ("quantize", "a recipe is a list"), ("- 3", "3 is not a pass")],
)
def test_a_wrong_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        read_recipe(path, KNOWN)
