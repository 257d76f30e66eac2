"""Stages that are skipped, go on, start again or fail; and what the user is told."""

import contextlib
import errno
import json
import os
import socket
from pathlib import Path

import pytest

from weakseg.errors import UserError
from weakseg.failures import mendable
from weakseg.runfolder import STAGES, RunFolder
from weakseg.stagefiles import fingerprint, read_record

INPUTS = {"seed": 0, "train": {"lr": 0.1, "steps": 5}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def done(run: RunFolder, inputs: dict = INPUTS, name: str = "train"):
    with (stage := run.stage(name, inputs, seed=3)).working():
        (stage.folder / "work.txt").write_text("done")
        stage.results["loss"] = 0.5
    return stage


def broken(run: RunFolder, error: BaseException, inputs: dict = INPUTS):
    stage = run.stage("train", inputs)
    with pytest.raises(BaseException) as caught, stage.working():  # noqa: PT011, PT012
        (stage.folder / "half.txt").write_text("half")
        raise error
    return caught.value


def test_fingerprints():
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": Path("x")}) == fingerprint({"a": "x"})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})


def test_stage_folders_are_numbered_in_order(run: RunFolder):
    names = [run.stage_folder(name).name for name in STAGES]
    assert names[:2] == ["1-check", "2-train"]
    assert names == sorted(names)


def test_a_finished_stage_describes_itself(run: RunFolder):
    stage = done(run)
    assert not stage.skipped
    assert stage.finished
    record = run.record("train")
    assert record is not None
    assert (record.stage, record.status, record.seed, record.starts) == ("train", "done", 3, 1)
    assert record.inputs == INPUTS
    assert record.fingerprint == fingerprint(INPUTS)
    assert record.results == {"loss": 0.5}
    assert set(record.versions) >= {"python", "torch", "timm", "lightning"}
    assert run.require("train") == run.path / "2-train"
    assert sorted(os.listdir(run.path / "2-train")) == ["stage.json", "work.txt"]


def test_the_same_inputs_are_skipped(run: RunFolder):
    done(run)
    again = run.stage("train", json.loads(json.dumps(INPUTS)))
    assert again.skipped
    assert again.finished
    assert not again.resumes
    assert again.changed == []
    assert again.results == {"loss": 0.5}


def test_other_inputs_name_their_keys_and_replace_the_old_work_when_done(run: RunFolder):
    home = done(run).folder
    other = run.stage("train", {"seed": 0, "train": {"lr": 0.2, "clip": 1}})
    assert not other.skipped
    assert not other.resumes
    assert other.changed == ["train.clip", "train.lr", "train.steps"]
    assert (other.folder / "work.txt").exists()  # asking changes nothing
    with other.working():
        assert os.listdir(other.folder) == ["stage.json"]
        assert other.folder != home
        assert run.record("train").status == "done", "the earlier one stays"
        assert (home / "work.txt").exists()
    assert other.folder == home
    assert os.listdir(run.path) == [home.name]
    assert os.listdir(home) == ["stage.json"]
    record = run.record("train")
    assert record is not None
    assert record.starts == 1
    assert record.results == {}


def test_work_that_was_edited_by_hand_is_not_overwritten(run: RunFolder):
    stage = done(run)
    edited = stage.folder / "work.txt"
    edited.write_text("corrected")
    os.utime(edited, (1, 1))
    again = run.stage("train", {**INPUTS, "seed": 1})
    with pytest.raises(UserError, match="changed by hand"), again.working():
        pass
    assert edited.read_text() == "corrected"
    assert run.stage("train", INPUTS).finished, "the record is left alone"


def test_a_running_stage_is_marked(run: RunFolder):
    with run.stage("train", INPUTS).working():
        record = run.record("train")
        assert record is not None
        assert record.status == "running"
        with pytest.raises(UserError, match=r"not finished \(running\)"):
            run.require("train")


def test_a_failed_stage_keeps_its_work_and_goes_on(run: RunFolder):
    error = broken(run, ValueError("odd"))
    assert isinstance(error, ValueError)
    record = run.record("train")
    assert record is not None
    assert (record.status, record.message) == ("failed", "odd")
    record.seconds = 100.0
    (run.path / "2-train/stage.json").write_text(json.dumps(vars(record)))

    again = run.stage("train", INPUTS)
    assert again.resumes
    assert not again.skipped
    with again.working():
        assert (again.folder / "half.txt").read_text() == "half"
    record = run.record("train")
    assert record is not None
    assert (record.status, record.starts, record.message) == ("done", 2, "")
    assert record.seconds >= 100  # time of all starts together


def test_an_interruption_is_a_failure_that_keeps_its_work(run: RunFolder):
    assert isinstance(broken(run, KeyboardInterrupt()), KeyboardInterrupt)
    assert run.stage("train", INPUTS).resumes
    assert (run.path / "2-train/half.txt").exists()


def test_a_failed_stage_of_other_inputs_is_cleared(run: RunFolder):
    broken(run, ValueError("odd"))
    with (other := run.stage("train", {"seed": 1})).working():
        assert not (other.folder / "half.txt").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"stage": "train"}', '{"x": 1}', "\xff"])
def test_a_damaged_record_counts_as_none_and_its_work_is_not_trusted(run: RunFolder, text: str):
    folder = done(run).folder
    (folder / "stage.json").write_bytes(text.encode("latin-1"))
    assert read_record(folder) is None
    stage = run.stage("train", INPUTS)
    assert not stage.skipped
    assert not stage.resumes
    assert stage.changed == []
    with stage.working():
        assert not (folder / "work.txt").exists()
    assert run.stage("train", INPUTS).skipped
    assert (run.path / "2-train.unknown-1/work.txt").read_text() == "done", "nor is it deleted"


def test_deleting_the_record_makes_the_stage_run_afresh(run: RunFolder):
    folder = done(run).folder
    (folder / "stage.json").unlink()
    with run.stage("train", INPUTS).working():
        assert os.listdir(folder) == ["stage.json"]


def test_what_is_required_but_missing_is_named_with_its_command(run: RunFolder):
    with pytest.raises(UserError) as caught:
        run.require("seeds")
    assert "stage 'seeds' has not been run" in str(caught.value)
    assert f"weakseg seeds {run.path}" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "what", "mend"),
    [
        (errno.ENOSPC, "the disk is full", "free some space"),
        (errno.EDQUOT, "the disk is full", "free some space"),
        (errno.EROFS, "cannot write here", "choose another folder with --out"),
        (errno.EACCES, "cannot write here", "choose another folder with --out"),
        (errno.EPERM, "cannot write here", "choose another folder with --out"),
    ],
)
def test_errors_of_the_disk_become_advice(run: RunFolder, code: int, what: str, mend: str):
    error = broken(run, OSError(code, "os says", "/some/file"))
    assert isinstance(error, UserError)
    assert error.what == what
    assert error.where == "/some/file"
    assert error.mend is not None
    assert error.mend.startswith(mend)
    record = run.record("train")
    assert record is not None
    assert record.status == "failed"
    assert what in record.message
    assert run.stage("train", INPUTS).resumes


def test_other_errors_stay_what_they_are(run: RunFolder):
    assert isinstance(broken(run, OSError(errno.EIO, "broken disk")), OSError)
    own = UserError("mine", mend="do it")
    assert broken(run, own) is own
    assert mendable(ValueError("x"), run.path) is None


def test_a_folder_that_cannot_be_made_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write here") as caught:
        done(run)
    assert caught.value.where == str(run.path / "2-train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(run: RunFolder):
    run.path.mkdir()
    run.path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot write here"):
            done(run)
    finally:
        run.path.chmod(0o755)


def test_a_disk_that_fills_while_the_record_is_written(run: RunFolder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = run.stage("train", INPUTS)
    with pytest.raises(UserError, match="the disk is full"), stage.working():  # noqa: PT012
        (stage.folder / "work.txt").write_text("all")
        monkeypatch.setattr("weakseg.files.os.replace", full)
    monkeypatch.undo()
    assert not run.stage("train", INPUTS).skipped
    assert run.stage("train", INPUTS).resumes
    assert sorted(os.listdir(stage.folder)) == ["stage.json", "work.txt"]


def test_files_of_a_file_manager_are_no_edits_and_leftovers_go(run: RunFolder):
    stage = run.stage("masks", {"a": 1})
    with stage.working():
        (stage.folder / "kept.png").write_text("x")
    (stage.folder / "Thumbs.db").write_text("x")
    later = stage.folder.stat().st_mtime + 100
    os.utime(stage.folder / "Thumbs.db", (later, later))
    with contextlib.suppress(KeyboardInterrupt), run.stage("masks", {"a": 2}).working() as stage:
        (stage.folder / "done.png").write_text("x")
        (stage.folder / f".done-p{2**22 + 1}-x1.png").write_text("half")
        raise KeyboardInterrupt
    with run.stage("masks", {"a": 2}).working() as stage:
        assert {p.name for p in stage.folder.iterdir()} == {"done.png", "stage.json"}


def test_a_full_gpu_is_named(run: RunFolder):
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    error = mendable(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), run.path)
    assert "memory of the GPU" in error.what
    assert "train.batch" in error.mend
    assert "cut it into parts (train.accumulate)" in error.mend, "fewer parts need more memory"


def test_half_cleared_work_does_not_pass_for_anything(run: RunFolder, monkeypatch):
    with contextlib.suppress(ValueError), run.stage("masks", {"a": 1}).working() as stage:
        (stage.folder / "kept.png").write_text("x")
        raise ValueError

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weakseg.runfolder.remove", killed)
    with pytest.raises(KeyboardInterrupt), run.stage("masks", {"a": 2}).working():
        pass
    assert (stage.folder / "kept.png").exists()
    for value in (1, 2):
        again = run.stage("masks", {"a": value})
        assert not again.finished
        assert not again.resumes


def test_a_second_process_is_kept_out_and_a_dead_one_is_not(run: RunFolder):
    run.path.mkdir()
    lock = run.path / ".lock"
    parent = os.getppid()
    lock.write_text(f"{socket.gethostname()} {parent}\n")
    with pytest.raises(UserError, match=f"process {parent} is working"), run.locked():
        pass
    lock.write_text(f"{socket.gethostname()} {2**22 + 1}\n")
    with run.locked():
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()
