"""The pages of the README and of the docs, wherever they lie, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks", "find_page", "inline", "pages"]

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```[ \t]*$",
    re.M | re.S,
)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block, or a piece of code in a sentence.

    Attributes:
        page: The file.
        line: Its first line, from 1.
        language: As written behind the fence; empty for code in a sentence.
        title: ``title="..."`` behind the language: the block is a whole file of that name.
        text: What stands in it.
    """

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def pages() -> list[Path]:
    """The README, the page for contributors, and all of the docs."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def find_page(name: str) -> Path:
    """The one page of that name, in whichever folder of the docs it lies."""
    (page,) = [p for p in pages() if p.name == name]
    return page


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, or all of them."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["info"])
        body = re.sub(rf"^{re.escape(match['indent'])}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 1
        block = Block(page, line, match["language"], title and title[1], body)
        if not languages or block.language in languages:
            found.append(block)
    return found


def inline(page: Path) -> list[Block]:
    """The pieces of code in the sentences of a page."""
    text = page.read_text(encoding="utf-8")
    prose = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    return [
        Block(page, prose.count("\n", 0, match.start()) + 1, "", None, match[1])
        for match in _CODE.finditer(prose)
    ]
