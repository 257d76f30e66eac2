"""The one exception that users are meant to see."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2.

    Args:
        what: One sentence that names the key or file, its value, and the rule it breaks.
        where: File, recipe key or stage in which it happened.
        mend: What to do about it, in the imperative.
    """

    def __init__(self, what: str, *, where: object = None, mend: str | None = None) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.mend = mend
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        return "\n".join(lines)

    def __reduce__(self):  # keeps the three parts when it crosses a process boundary
        return _rebuild, (self.what, self.where, self.mend)


def _rebuild(what: str, where: str | None, mend: str | None) -> UserError:
    return UserError(what, where=where, mend=mend)
