"""What the user sees while something runs: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar", "console", "track"]

console = Console(stderr=True, highlight=False)
"""Messages and bars go to stderr, so that stdout stays free for results."""

T = TypeVar("T")

_QUIET_SECONDS = 20.0  # without a terminal: time between two lines of one bar


class Bar:
    """Progress of one long step.

    Args:
        title: What is being done.
        total: How many items in all.
        done: How many were done before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._note = ""
        self._spoken = time.monotonic()
        self._rich: Progress | None = None

    def __enter__(self) -> Bar:
        if console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._rich.start()
            self._task = self._rich.add_task(
                self.title, total=self.total, completed=self.done, note=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif kind is None:
            self._speak()

    def to(self, done: int, note: str = "") -> None:
        """Moves the bar to ``done`` items, with a short note such as the loss."""
        self.done, self._note = done, note
        if self._rich is not None:
            self._rich.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._spoken > _QUIET_SECONDS:
            self._speak()

    def of(self, done: int, total: int) -> None:
        """Moves the bar to ``done`` items of ``total``, where that is known only now."""
        self.total = total
        if self._rich is not None:
            self._rich.update(self._task, total=total)
        self.to(done)

    def step(self, count: int = 1) -> None:
        """Moves the bar by ``count`` items."""
        self.to(self.done + count, self._note)

    def _speak(self) -> None:
        self._spoken = time.monotonic()
        console.print(f"  {self.title}: {self.done}/{self.total} {self._note}".rstrip())


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows how far it is."""
    count = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with Bar(title, count) as bar:
        for item in items:
            yield item
            bar.step()
