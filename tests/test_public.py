"""The public surface: everything imports, every public name exists, none hides another."""

import ast
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest

import weakseg
from weakseg.registry import Registry

MODULES = sorted(m.name for m in pkgutil.walk_packages(weakseg.__path__, "weakseg."))


@pytest.fixture(scope="module")
def modules() -> dict[str, types.ModuleType]:
    """All modules, after all of them were imported: an import may hide a function."""
    imported = [importlib.import_module(name) for name in ["weakseg", *MODULES]]
    return {module.__name__: module for module in imported}


def test_there_is_something_to_import():
    assert {"weakseg.cli", "weakseg.ops.scores", "weakseg.methods.cam"} <= set(MODULES)


def test_every_public_name_exists(modules):
    for name, module in modules.items():
        for public in getattr(module, "__all__", ()):
            assert hasattr(module, public), f"{name}.{public}"


def test_no_public_name_is_hidden_by_a_module(modules):
    for name, module in modules.items():
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            assert not isinstance(value, types.ModuleType), f"{name}.{public} is a module"
            if name != "weakseg.ops":  # its __init__ binds the function after the module, for good
                assert f"{name}.{public}" not in modules, f"{name}.{public} is also a module"


def test_functions_and_classes_come_from_inside(modules):
    """A public name is defined in its module, or in one further down."""
    for name, module in modules.items():
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__module__.startswith(name), f"{name}.{public}"


def test_the_package_offers_what_it_promises(modules):
    assert set(dir(weakseg)) == set(weakseg.__all__)
    for name in weakseg.__all__:
        value = getattr(weakseg, name)
        assert callable(value) or name == "__version__", name
    assert callable(weakseg.run)
    assert callable(weakseg.load)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = weakseg.nothing


def test_every_module_describes_itself(modules):
    for name, module in modules.items():
        assert module.__doc__, name
        assert module.__doc__.strip(), name


def test_modules_with_public_definitions_list_them(modules):
    for name, module in modules.items():
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        public = [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
        assert not public or hasattr(module, "__all__"), f"{name} defines {public}"


def test_public_names_are_sorted(modules):
    for name, module in modules.items():
        listed = [n for n in getattr(module, "__all__", ()) if not n.startswith("__")]
        order = sorted(listed, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
        assert listed == order, name


def test_registries_are_filled(modules):
    """Every registry finds its members, also when nobody imported them first."""
    for name, module in modules.items():
        for value in vars(module).values():
            if isinstance(value, Registry):
                assert list(value), name
                assert all(value[member] is not None for member in value)
