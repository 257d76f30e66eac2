"""How much memory there is; keeps that of freed tensors for the next ones, and waiting threads from
spinning.

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
from pathlib import Path

__all__ = ["keep_freed_memory", "machine_memory", "wait_without_spinning"]

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


def machine_memory() -> int | None:
    """Bytes that processes of this machine, or of its container, can have; ``None`` if unknown.

    Swapped memory counts: what fits into it is slow, and not killed.
    """
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # of Windows, and of exotic systems
        return None
    limits = [_number(file) for file in _CGROUP_LIMITS]
    return min([physical + _swap(), *(limit for limit in limits if limit is not None)])


_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # the word "max" is no limit
        return None


def _swap() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("SwapTotal"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
