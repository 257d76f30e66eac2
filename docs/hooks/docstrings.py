"""Docstrings as Markdown: their roles, and formulas in LaTeX, are reStructuredText."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?|\n)+)", re.M)


class Roles(Extension):
    """Translates every docstring that has been read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Before sections such as Args are looked for."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Formulas between dollars; roles as code."""

    def block(found: re.Match[str]) -> str:
        lines = textwrap.dedent(found[2]).strip()
        latex = f"\\begin{{aligned}}\n{lines}\n\\end{{aligned}}"
        return textwrap.indent(f"$$\n{latex}\n$$\n\n", found[1])

    text = _BLOCK.sub(block, text)
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${' '.join(m[1].split())}$", text)
    return re.sub(r":(?:func|mod|class|meth|data):`~?([^`]+)`", r"`\1`", text)
