"""Content decides, however a file's times and name came about."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from weakseg import digests as module
from weakseg.digests import digest, digests, together


def expected(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in a process that has read none so far."""
    names: list[str] = []
    original = module._read

    def counted(path, status):
        names.append(Path(path).name)
        return original(path, status)

    monkeypatch.setattr(module, "_read", counted)
    monkeypatch.setattr(module, "_known", {})
    return names


def at_rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a minute had gone by since the file was written."""
    now = path.stat().st_ctime_ns
    monkeypatch.setattr(module.time, "time_ns", lambda: now + 60 * 10**9)


def test_content_decides(tmp_path: Path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    shutil.copy2(tmp_path / "a", tmp_path / "d")
    os.utime(tmp_path / "a", (5, 5))
    a, b, c, d = digests([tmp_path / name for name in "abcd"])
    assert a == b == d == expected(tmp_path / "a")
    assert c == expected(tmp_path / "c") != a


def test_what_is_no_file_has_none(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = ["missing", "folder", "pipe", "n" * 300, "nul\0"]
    assert digests([tmp_path / name for name in names]) == [None] * 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_has_none(tmp_path: Path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "a").chmod(0)
    assert digest(tmp_path / "a") is None


def test_a_file_at_rest_is_read_once(tmp_path: Path, monkeypatch, reads):
    file = tmp_path / "a"
    file.write_text("one")
    at_rest(file, monkeypatch)
    assert digest(file) == digest(file) == expected(file)
    file.rename(tmp_path / "b")
    assert digest(tmp_path / "b") == expected(tmp_path / "b")
    assert reads == ["a", "b"], "a rename changes the inode's time, so it is read once more"


def test_a_change_that_hides_its_time_and_size_is_seen(tmp_path: Path, monkeypatch, reads):
    file = tmp_path / "a"
    file.write_text("one")
    before = file.stat()
    at_rest(file, monkeypatch)
    first = digest(file)
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_size == 3
    assert digest(file) == expected(file) != first


def test_a_file_just_written_is_read_each_time(tmp_path: Path, reads):
    """It may be written again before its file system's clock has moved on."""
    (tmp_path / "a").write_text("one")
    digest(tmp_path / "a")
    digest(tmp_path / "a")
    assert reads == ["a", "a"]


def test_much_is_kept_for_the_next_process(tmp_path: Path, monkeypatch, reads):
    monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_MUCH", 5)
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(f"of {file.name}")
    at_rest(files[1], monkeypatch)
    first = digests(files)
    for damage in (None, b"no database"):
        if damage is not None:
            (tmp_path / "cache/digests.sqlite").write_bytes(damage)
        monkeypatch.setattr(module, "_known", {})
        reads.clear()
        assert digests(files) == first == [expected(file) for file in files]
        assert sorted(reads) == ([] if damage is None else ["a", "b"])


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch, reads):
    (tmp_path / "file").write_text("where a folder is needed")
    monkeypatch.setenv("WEAKSEG_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(module, "_MUCH", 0)
    assert digest(tmp_path / "file") == expected(tmp_path / "file")


def test_names_and_order_are_part_of_a_common_digest():
    parts = [("a", "1"), ("b", "2")]
    assert together(parts) == together(iter(parts))
    others = ([("b", "2"), ("a", "1")], [("a", "1"), ("b", None)], [("a", "1b2")])
    assert together(parts) not in {together(other) for other in others}
