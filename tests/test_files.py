"""A file that exists is complete."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from weakseg.files import atomic_path, write_json


def test_the_file_appears_only_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "new/folder/a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename is atomic only within one file system
        assert temporary.suffix == ".txt"  # writers that look at the suffix need it
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("weakseg.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_the_result(tmp_path: Path):
    write_json(tmp_path / "a.json", 1)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_json_round_trip(tmp_path: Path):
    value = {"path": tmp_path, "numbers": [1, 2.5, None], "text": "ä"}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        **value,
        "path": str(tmp_path),
    }


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path):
    write_json(tmp_path / "a.json", "old")
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="[Cc]ircular"):
        write_json(tmp_path / "a.json", loop)
    assert json.loads((tmp_path / "a.json").read_text()) == "old"
    assert os.listdir(tmp_path) == ["a.json"]
