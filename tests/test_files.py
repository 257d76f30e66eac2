"""A file that exists is complete."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from weakseg.files import (
    atomic_path,
    beside,
    put_in_place,
    remove,
    remove_leftovers,
    undo_half,
    write_json,
)


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


DEAD = 99999999  # a number that no process has


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a.txt").write_text(text)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path: Path):
    target = folder(tmp_path / "target", "old")
    put_in_place(folder(tmp_path / "new", "new"), target)
    assert (target / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]
    put_in_place(folder(tmp_path / "new", "first"), tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "target"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch):
    target, new = folder(tmp_path / "target", "old"), folder(tmp_path / "new", "new")
    original = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self == new:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        put_in_place(new, target)
    assert (target / "a.txt").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["new", "target"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_that_dies_in_between_loses_neither(tmp_path: Path, monkeypatch, renames):
    target, new = folder(tmp_path / "target", "old"), folder(tmp_path / "new", "new")
    original, done = Path.rename, []

    def dies(self: Path, to: Path) -> Path:
        if len(done) == renames:
            os._exit(9)
        done.append(self)
        return original(self, to)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", dies)
        monkeypatch.setattr("weakseg.files.remove", lambda _: os._exit(9))
        put_in_place(new, target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    undo_half(tmp_path)
    assert (target / "a.txt").read_text() == ("old" if renames == 1 else "new")
    assert sorted(os.listdir(tmp_path)) == (["new", "target"] if renames == 1 else ["target"])
    undo_half(tmp_path)
    assert target.exists()


def test_of_a_link_the_link_alone_is_removed(tmp_path: Path):
    kept = folder(tmp_path / "kept", "precious")
    (tmp_path / "link").symlink_to(kept)
    put_in_place(folder(tmp_path / "new", "new"), tmp_path / "link")
    assert (kept / "a.txt").read_text() == "precious"
    assert (tmp_path / "link" / "a.txt").read_text() == "new"
    (tmp_path / "second").symlink_to(kept)
    remove(tmp_path / "second")
    assert (kept / "a.txt").exists()


def test_leftovers_of_dead_processes_go_and_nothing_else(tmp_path: Path):
    mine = {".profile", ".a-1-b.txt", f".x-p{os.getppid()}-abc.txt", "a-p1-b", ".weakseg.jsonl"}
    dead = {f".report-p{DEAD}-ab_1.html", f".x-p{os.getpid()}-abc.txt"}
    for name in mine | dead:
        (tmp_path / name).write_text("x")
    folder(tmp_path / f".out-p{DEAD}-abc", "half")
    deep = folder(tmp_path / "deep", "x") / f".y-p{DEAD}-abc.png"
    deep.write_text("x")
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == mine | {"deep"}
    assert deep.exists()
    remove_leftovers(tmp_path, deep=True)
    assert os.listdir(tmp_path / "deep") == ["a.txt"]
    remove_leftovers(tmp_path / "missing")


def test_leftovers_of_one_name(tmp_path: Path):
    for name in (f".out-p{DEAD}-a", f".other-p{DEAD}-a", f".out-more-p{DEAD}-a"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, of="out")
    assert sorted(os.listdir(tmp_path)) == [f".other-p{DEAD}-a", f".out-more-p{DEAD}-a"]


def test_a_temporary_folder_is_gone_unless_it_was_renamed(tmp_path: Path):
    with beside(tmp_path / "out") as temporary:
        (temporary / "a").write_text("x")
        assert temporary.parent == tmp_path
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o755
    assert os.listdir(tmp_path) == []
    with beside(tmp_path / "out") as temporary:
        temporary.rename(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_name_of_the_greatest_length(tmp_path: Path):
    path = tmp_path / ("n" * 251 + ".txt")
    with atomic_path(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_a_list_is_told_before_the_file_exists(tmp_path: Path):
    told = []
    with atomic_path(
        tmp_path / "a", note=lambda new, path: told.append((new.read_text(), path.exists()))
    ) as temporary:
        temporary.write_text("x")
    assert told == [("x", False)]
