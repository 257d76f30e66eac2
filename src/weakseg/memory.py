"""Keeps the memory of freed tensors for the next ones, and waiting threads from spinning.

glibc gives large blocks back to the system when they are freed and fetches them again a moment
later. A training step frees and allocates the same gigabytes each time, so that up to 40 % of its
time goes into page faults (EfficientNet-Lite2, 16 images of 256 px: 384,000 faults a step, 19 % of
the processor time with one thread; 2,000 and 1 % with these settings, for 3 % more memory at the
peak). Other systems' allocators have no such settings and are left as they are.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory", "wait_without_spinning"]

# Numbers of <malloc.h>: what is freed is kept up to TRIM bytes, the heap grows by PAD at least, and
# large blocks are part of it instead of mappings of their own.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_TRIM, _PAD = 2**31 - 1, 100_000_000
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory, before a training or many predictions; again does no harm.

    Returns:
        Whether it was told: not where another C library or allocator is used, nor where the user
        has set glibc's variables.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _TRIM), (_TOP_PAD, _PAD))
    answers = [mallopt(ctypes.c_int(key), ctypes.c_int(value)) == 1 for key, value in settings]
    return all(answers)  # all of them are asked for, also after one that is refused


def wait_without_spinning() -> None:
    """Lets OpenMP's idle threads sleep; it counts only before torch is imported.

    Threads that spin while they wait take a core from other processes: two spinning threads on a
    shared machine do a third of the work of one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
