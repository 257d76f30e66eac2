"""The allocator's settings, as the system shows them."""

import platform
import subprocess
import sys

import pytest

from weakseg.memory import keep_freed_memory

_FAULTS = """
import resource, sys, numpy
from weakseg.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory() and keep_freed_memory()
numpy.ones(2**25)  # the first one is new in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    numpy.ones(2**25)  # 256 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_memory_is_fetched_once():
    faults = {}
    for how in ("plain", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True
        )
        faults[how] = int(done.stdout)
    assert faults["kept"] * 20 < faults["plain"]


def test_what_a_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert not keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
