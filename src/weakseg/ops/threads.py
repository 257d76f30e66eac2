"""Compiled loops over parts of an array, in threads of our own.

Numba's parallel loops are not used: they share OpenMP with torch, whose number of threads they
change for good; some of the layers they run on may not be entered from two threads at once, others
not after a fork, and both are usual where images are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numba

__all__ = ["Split", "bounds", "jit", "splitter"]

Split = Callable[[Callable[[int, int], None]], None]
"""Calls work(part, parts) for every part, each in a thread, and returns when all are done."""


def jit(function: Callable | None = None, **options: Any) -> Callable:
    """Compiles without the interpreter lock, and keeps the code on disk where there is a place.

    ``options`` are numba's; with them it is a decorator factory.
    """
    if function is None:
        return lambda loop: jit(loop, **options)
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True, **options)(function)


@contextmanager
def splitter(threads: int) -> Iterator[Split]:
    """Splits work over this many threads."""
    if threads == 1:
        yield lambda work: work(0, 1)
        return
    with ThreadPoolExecutor(threads - 1) as pool:

        def split(work: Callable[[int, int], None]) -> None:
            others = [pool.submit(work, part, threads) for part in range(1, threads)]
            work(0, threads)
            for other in others:
                other.result()

        yield split


def bounds(size: int, part: int, parts: int) -> tuple[int, int]:
    """Start and stop of one of several equal parts."""
    return size * part // parts, size * (part + 1) // parts
