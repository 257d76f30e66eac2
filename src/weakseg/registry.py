"""One decorator-based registry for methods, mixes, sources, steps of refinement and formats."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from weakseg.errors import UserError

__all__ = ["Registry", "suggest"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects; members register themselves when their module is imported.

    Args:
        kind: What a member is called in error messages, such as ``"method"``.
        package: Package whose modules are imported before the first look-up, so that
            adding a member means adding one file.
        group: Entry points of this group, which other installed packages may declare, are
            imported after them. The name of an entry point is that of the member in it.
    """

    def __init__(self, kind: str, package: str | None = None, group: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._group = group
        self._members: dict[str, T] = {}
        self._broken: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a member under ``name``; a name can be taken only once."""

        def add(member: T) -> T:
            if name in self._members and self._members[name] is not member:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._members[name] = member
            return member

        return add

    def __getitem__(self, name: str) -> T:
        self._discover()
        try:
            return self._members[name]
        except KeyError:
            if name in self._broken:
                raise UserError(
                    f"the {self.kind} {name!r} cannot be used: {self._broken[name]}",
                    mend="mend that package, or uninstall it",
                ) from None
            raise UserError(
                f"unknown {self.kind} {name!r}", mend=suggest(name, self._members)
            ) from None

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._members))

    def _discover(self) -> None:
        if self._package is not None:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._package = None
        if self._group is not None:
            group, self._group = self._group, None
            for point in entry_points(group=group):
                self._add(point)

    def _add(self, point: EntryPoint) -> None:
        """Imports a member of another package; a broken one must not stop the others."""
        try:
            point.load()
        except (Exception, SystemExit) as error:  # whatever that package does when imported
            self._broken[point.name] = f"{point.value} fails with {type(error).__name__}: {error}"
            return
        if point.name not in self._members:
            self._broken[point.name] = f"{point.value} registers no {self.kind} of that name"


def suggest(name: str, valid) -> str:
    """The mend for an unknown name: the nearest valid one, and all of them where they are few."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if len(names) > 40:  # a list that long hides the answer
        return (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"one of {len(names)} valid names"
        )
    listed = ", ".join(names) or "(none)"
    return f"did you mean {near[0]!r}? Valid names: {listed}" if near else f"use one of: {listed}"
