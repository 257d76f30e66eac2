"""Words of others in Markdown: names of files and classes that stay words.

What is escaped: everything that would become a tag, an entity, emphasis, a link (addresses are
links of their own on the usual sites), an image, code, a formula, a cell or a heading.
"""

from __future__ import annotations

import re

__all__ = ["code_block", "plain"]

_MARKS = re.compile(r"[\\`*\[\]|~$<&>]|(?<![^\W_])_|_(?![^\W_])")
_START = re.compile(r"^(?:[#+=-]|\d+(?=[.)]))")
_ADDRESS = re.compile(r"(?<=\w):(?=//)|(?<=\bwww)\.|@|(?<=mailto):|(?<=xmpp):", re.I)


def plain(text: object) -> str:
    """One line of text that Markdown shows as it is, inside a line, a list item or a table's cell."""
    line = re.sub(r"\s+", " ", str(text))
    line = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line)
    line = _MARKS.sub(lambda m: _ENTITIES.get(m[0], f"\\{m[0]}"), line)
    line = _ADDRESS.sub(lambda m: f"\\{m[0]}", line)
    return _START.sub(lambda m: f"{m[0]}\\" if m[0].isdigit() else f"\\{m[0]}", line)


def code_block(text: str) -> str:
    """Lines of code behind a fence that nothing in them can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
