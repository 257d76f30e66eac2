"""Parts that cover everything, errors that are not lost, and compiling without a cache."""

import numba
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakseg.ops import threads
from weakseg.ops.threads import bounds, jit, splitter


@given(st.integers(0, 100), st.integers(1, 12))
def test_parts_cover_everything_once(size, parts):
    cuts = [bounds(size, part, parts) for part in range(parts)]
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(size))


def test_an_error_in_any_part_is_raised():
    def fail(part: int, parts: int) -> None:
        if part == parts - 1:
            raise RuntimeError("part failed")

    for count in (1, 3):
        with splitter(count) as split, pytest.raises(RuntimeError, match="part failed"):
            split(fail)


def test_it_compiles_where_nothing_can_be_written(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba_njit(**options)

    numba_njit = numba.njit
    monkeypatch.setattr(threads.numba, "njit", njit)
    assert jit(lambda x: x + 1)(1) == 2
    assert jit(error_model="numpy")(lambda x: 1.0 / x)(0.0) == float("inf")
