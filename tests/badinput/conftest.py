"""The command line inside this process, and a look at whether anything was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.badinput.corpus import World
from weakseg import cli


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, pattern: str) -> None:
        """It ended with code 2, a message that matches, and a mend."""
        import re

        assert self.code == 2, self.err
        assert re.search(pattern, self.err), self.err
        assert "mend" in self.err, self.err


Weakseg = Callable[..., Result]


@pytest.fixture
def weakseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Weakseg:
    """Runs a command; any exception but an exit is a failure of the test, as a traceback is."""

    def call(*words: object) -> Result:
        monkeypatch.setattr("sys.argv", ["weakseg", *map(str, words)])
        monkeypatch.setattr(cli.console, "_width", 2000)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


def listing(folder: Path, *without: Path) -> dict[str, tuple]:
    """Every file, folder and link below, with size and time; less some folders."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if Path(place, f) not in without]
        for name in [*folders, *files]:
            stat = os.lstat(os.path.join(place, name))
            size = 0 if name in folders else stat.st_size
            found[os.path.relpath(os.path.join(place, name), folder)] = (size, stat.st_mtime_ns)
    return found
