"""The sandbox of the docs' commands, built once and put back before each test."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.docs.sandbox import build


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder that commands run in, and a copy of it as it was."""
    root = tmp_path_factory.mktemp("docs")
    work, kept = root / "work", root / "kept"
    work.mkdir()
    before = Path.cwd()
    os.chdir(work)
    try:
        build(work)
    finally:
        os.chdir(before)
    shutil.copytree(work, kept, symlinks=True)
    return work, kept


@pytest.fixture
def sandbox(_built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, as it was built: always at one path, since runs keep the data's."""
    work, kept = _built
    shutil.rmtree(work)
    shutil.copytree(kept, work, symlinks=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("WEAKSEG_CACHE", str(work.parent / "cache"))
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    return work


def _refuse(*_: object) -> None:
    raise AssertionError("something in the docs' examples asks for the network")
