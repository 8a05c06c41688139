"""What tiles ask for ahead: together all of the next panel's weights, and nothing beyond the last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.ahead import NextPanel
from mcc.backends.cpu.kernels.tiles import balanced


@given(
    rows=st.integers(2, 200), tile=st.integers(3, 14), vectors=st.integers(1, 4), steps=st.integers(1, 90),
    panels=st.integers(1, 4), varies=st.booleans(), data=st.data(),
)  # fmt: skip
def test_tiles_ask_for_all_of_the_next_panel(rows, tile, vectors, steps, panels, varies, data):
    words, panel = vectors * 16, data.draw(st.integers(0, panels - 1))
    size = panels * words * steps
    following = NextPanel(None, size, (panel + 1) * words * steps, words, steps)
    asked = set()
    for first, number, count in balanced(rows, tile):
        for n in range(number):
            begin, stride = following.words_of((first + n * count, count, T.int64(rows) if varies else rows))
            asked.update(range(int(begin), int(begin) + int(stride) * steps))
    assert max(asked) < size
    wanted = range((panel + 1) * words * steps, (panel + 2) * words * steps)
    assert panel == panels - 1 or asked.issuperset(wanted)
