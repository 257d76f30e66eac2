"""Members register themselves, and an unknown name names its neighbours."""

import sys
from pathlib import Path

import pytest

from weakseg.errors import UserError
from weakseg.registry import Registry, suggest


def test_members_are_found_by_name_and_listed_in_order():
    registry: Registry[type] = Registry("thing")
    registry.register("b")(int)
    assert registry.register("a")(str) is str
    assert registry["b"] is int
    assert list(registry) == ["a", "b"]
    assert "a" in registry
    assert "c" not in registry


def test_a_name_is_taken_only_once():
    registry: Registry[type] = Registry("thing")
    registry.register("a")(int)
    registry.register("a")(int)  # the same member again: a module that was imported twice
    with pytest.raises(ValueError, match="thing 'a' is registered twice"):
        registry.register("a")(str)
    assert registry["a"] is int


def test_unknown_name_is_answered_with_the_nearest_and_all():
    registry: Registry[type] = Registry("method")
    for name in ("cam", "puzzle", "seam"):
        registry.register(name)(int)
    with pytest.raises(UserError) as caught:
        registry["puzle"]
    assert caught.value.what == "unknown method 'puzle'"
    assert caught.value.mend == "did you mean 'puzzle'? Valid names: cam, puzzle, seam"


@pytest.mark.parametrize(
    ("name", "valid", "words"),
    [
        ("seem", ["seam", "cam"], "did you mean 'seam'? Valid names: cam, seam"),
        ("xyz", ["seam", "cam"], "use one of: cam, seam"),
        ("xyz", [], "use one of: (none)"),
        ("net07", [f"net{i:02}" for i in range(50)], "did you mean 'net07' or "),
        ("qqqq", [f"net{i:02}" for i in range(50)], "one of 50 valid names"),
    ],
)
def test_suggestions(name, valid, words):
    assert suggest(name, valid).startswith(words)


def test_one_file_in_the_package_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "a_package_of_members"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from weakseg.registry import Registry\nmembers = Registry('member', __name__)\n"
    )
    (package / "one.py").write_text(
        "from a_package_of_members import members\n\n@members.register('one')\nclass One: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    members = __import__("a_package_of_members").members
    assert "a_package_of_members.one" not in sys.modules
    assert list(members) == ["one"]
    assert members["one"].__name__ == "One"


def test_an_error_while_finding_members_is_not_forgotten(tmp_path: Path, monkeypatch):
    package = tmp_path / "a_broken_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from weakseg.registry import Registry\nmembers = Registry('member', __name__)\n"
    )
    (package / "one.py").write_text("raise RuntimeError('broken file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    members = __import__("a_broken_package").members
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken file"):
            list(members)


def install(folder: Path, **modules: str) -> None:
    """Packages as pip would leave them: a module each, and an entry point of its name."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
        (folder / f"{name}-1.dist-info").mkdir()
        (folder / f"{name}-1.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (folder / f"{name}-1.dist-info/entry_points.txt").write_text(
            f"[a_group]\n{name.removeprefix('plugin_')} = {name}\n"
        )


def test_other_packages_declare_members_as_entry_points(tmp_path: Path, monkeypatch):
    members: Registry[type] = Registry("member", group="a_group")
    members.register("own")(int)
    monkeypatch.setitem(sys.modules, "a_registry", members)
    register = "import sys\nsys.modules['a_registry'].register({!r})({})\n"
    install(
        tmp_path,
        plugin_good=register.format("good", "str"),
        plugin_broken="raise RuntimeError('no such library')",
        plugin_own=register.format("own", "str"),
        plugin_silent="",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "plugin_good" not in sys.modules, "nothing is imported before it is asked for"
    assert list(members) == ["good", "own"]
    assert members["own"] is int, "a name that is taken stays whose it was"
    with pytest.raises(UserError, match="plugin_broken fails with RuntimeError: no such") as caught:
        members["broken"]
    assert "uninstall" in (caught.value.mend or "")
    with pytest.raises(UserError, match="plugin_silent registers no member of that name"):
        members["silent"]
    with pytest.raises(UserError, match="unknown member 'other'"):
        members["other"]
