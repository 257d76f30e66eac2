"""Only what weakseg wrote, and nobody changed, is written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weakseg.errors import UserError
from weakseg.files import atomic_path
from weakseg.outputs import (
    LIST_FILE,
    STAGES,
    Outputs,
    claim,
    is_output,
    require_absent,
    set_aside,
    visible,
)
from weakseg.runfolder import RunFolder


def write(folder: Path, files: dict[str, str], *, overwrite: bool = False) -> Outputs:
    """What a command does."""
    outputs = claim(folder, list(files), overwrite=overwrite)
    outputs.begin("test", whole=not visible(folder))
    for name, text in files.items():
        with atomic_path(folder / name, note=outputs.note) as temporary:
            temporary.write_text(text)
    return outputs


def test_a_command_writes_over_what_it_wrote(tmp_path: Path):
    out = tmp_path / "new/out"
    write(out, {"a.txt": "1", "cat/b.txt": "2"})
    write(out, {"a.txt": "3", "cat/c.txt": "4"})
    assert {p.name: p.read_text() for p in out.rglob("?.txt")} == {
        "a.txt": "3",
        "b.txt": "2",
        "c.txt": "4",
    }
    assert Outputs(out).files.keys() == {"a.txt", "cat/b.txt", "cat/c.txt"}


def test_what_somebody_made_or_changed_is_refused_and_nothing_is_written(tmp_path: Path):
    write(tmp_path, {"a.txt": "1", "b.txt": "2"})
    (tmp_path / "a.txt").write_text("corrected")
    (tmp_path / "c.txt").write_text("own")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    before = (tmp_path / LIST_FILE).read_bytes()
    for name in ("a.txt", "c.txt", "gone", "folder"):
        with pytest.raises(UserError) as caught:
            claim(tmp_path, [name, "b.txt"])
        assert caught.value.where == str(tmp_path / name)
        assert "--overwrite" in caught.value.mend
    assert (tmp_path / LIST_FILE).read_bytes() == before
    assert (tmp_path / "c.txt").read_text() == "own"
    write(tmp_path, {"a.txt": "3", "c.txt": "4", "gone": "5"}, overwrite=True)
    assert (tmp_path / "a.txt").read_text() == "3"
    assert not (tmp_path / "nowhere").exists(), "the link was replaced, not followed"
    write(tmp_path, {"c.txt": "6"})


def test_a_link_to_our_own_file_is_not_ours(tmp_path: Path):
    write(tmp_path, {"a.txt": "1"})
    (tmp_path / "a.txt").rename(tmp_path / "elsewhere.txt")
    (tmp_path / "a.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(UserError):
        claim(tmp_path, ["a.txt"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_inside_an_output_folder_are_not_followed(tmp_path: Path, overwrite: bool):
    out, away = tmp_path / "out", tmp_path / "away"
    write(out, {"x.txt": "1"})
    away.mkdir()
    (out / "cat").symlink_to(away)
    with pytest.raises(UserError) as caught:
        claim(out, ["cat/b.txt"], overwrite=overwrite)
    assert caught.value.where == str(out / "cat")


def test_a_killed_command_leaves_files_that_the_next_one_knows(tmp_path: Path):
    """The list has a file before it exists."""
    outputs = claim(tmp_path, ["a.txt", "b.txt"])
    outputs.begin("test", whole=True)
    with atomic_path(tmp_path / "a.txt", note=outputs.note) as temporary:
        temporary.write_text("1")
    with (tmp_path / LIST_FILE).open("a") as file:
        file.write('{"file": "b.t')  # killed here
    (tmp_path / ".b-p99999999-x1.txt").write_text("half")
    again = claim(tmp_path, ["a.txt", "b.txt"])
    assert again.files.keys() == {"a.txt"} and again.whole
    again.begin("test")
    assert sorted(p.name for p in tmp_path.iterdir()) == [LIST_FILE, "a.txt"]


@pytest.mark.parametrize("text", ["", "[]", "null\n3", "{", '{"file": 3, "digest": []}', "\0"])
def test_a_damaged_list_vouches_for_nothing(tmp_path: Path, text: str):
    write(tmp_path, {"a.txt": "1"})
    (tmp_path / LIST_FILE).write_text(text)
    assert not Outputs(tmp_path).whole
    with pytest.raises(UserError):
        claim(tmp_path, ["a.txt"])


def test_nothing_at_all_may_stand_there(tmp_path: Path):
    require_absent(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError):
        require_absent(tmp_path / "link")
    require_absent(tmp_path / "link", overwrite=True)


def test_what_was_changed_is_set_aside_under_a_free_name(tmp_path: Path):
    for text in ("1", "2"):
        (tmp_path / "report.html").write_text(text)
        set_aside(tmp_path / "report.html")
    assert (tmp_path / "report-1.html").read_text() == "1"
    assert (tmp_path / "report-2.html").read_text() == "2"
    assert not (tmp_path / "report.html").exists()


def test_outputs_are_known_by_what_lies_in_them(tmp_path: Path):
    def names(folder: Path) -> set[str]:
        return {p.name for p in folder.iterdir()}

    run = RunFolder(tmp_path / "run")
    for name in STAGES:
        with run.stage(name, {}).working():
            pass
        assert is_output(run.stage_folder(name), names(run.stage_folder(name)))
    assert is_output(run.path, names(run.path))
    (run.path / "1-check/stage.json").write_text("damaged")
    assert is_output(run.path, names(run.path))
    corrected = tmp_path / "corrected"
    corrected.mkdir()
    (corrected / "corrected.json").write_text('{"imports": []}')
    assert is_output(corrected, names(corrected))
    write(tmp_path / "whole", {"a.png": "1"})
    assert is_output(tmp_path / "whole", names(tmp_path / "whole"))


def test_what_only_looks_like_an_output_is_none(tmp_path: Path):
    def names(folder: Path) -> set[str]:
        return {p.name for p in folder.iterdir()}

    for text in ("", "[]", json.dumps({"stage": "a theatre's"})):
        (tmp_path / "stage.json").write_text(text)
        (tmp_path / "corrected.json").write_text(text)
        assert not is_output(tmp_path, names(tmp_path))
    own = tmp_path / "own"
    (own / "2-train").mkdir(parents=True)
    assert not is_output(own, names(own)), "a class of a toy shop"
    (tmp_path / "recipe.yaml").write_text("{}")
    assert not is_output(tmp_path, names(tmp_path)), "a recipe beside photos"
    (own / "mine.txt").write_text("mine")
    write(own, {"a.png": "1"})
    assert not is_output(own, names(own))
