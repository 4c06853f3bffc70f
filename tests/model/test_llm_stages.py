"""Tests of how the layers are divided into the chunks of pipeline stages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.llm.stages import chunk_layers, stage_chunks


@given(st.integers(1, 16), st.integers(1, 8), st.integers(0, 100))
def test_every_layer_is_in_one_chunk_and_chunks_are_nearly_equal(pp: int, vp: int, more: int) -> None:
    num_layers = pp * vp + more
    chunks = chunk_layers(num_layers, pp, vp)
    assert len(chunks) == pp * vp and sum(chunks) == num_layers
    assert max(chunks) - min(chunks) <= 1 and min(chunks) >= 1
    held = [stage_chunks(num_layers, pp, vp, stage) for stage in range(pp)]
    assert [held[c % pp][c // pp] for c in range(pp * vp)] == list(chunks)


def test_the_ends_of_the_llm_have_fewer_layers() -> None:
    assert chunk_layers(80, 4) == (20, 20, 20, 20)
    assert chunk_layers(126, 8) == (15, 16, 16, 16, 16, 16, 16, 15)
    assert chunk_layers(127, 8)[-1] == 15 and chunk_layers(127, 8)[0] == 16
    assert chunk_layers(7, 2, 2) == (2, 2, 2, 1)
    assert chunk_layers(6, 4) == (1, 2, 2, 1)
