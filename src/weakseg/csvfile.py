"""CSV tables that a spreadsheet may open: no cell of them is a formula.

File and class names are whatever somebody called them, and a spreadsheet runs a cell that begins
with ``=``, ``+``, ``-`` or ``@``. An apostrophe before it makes it text, in all usual spreadsheets;
numbers stay as they are, and reading takes the apostrophe away again.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weakseg.files import atomic_path

__all__ = ["csv_text", "read_csv", "write_csv"]

_ERRORS = "surrogateescape"  # names of files need not be UTF-8
_FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@\uff1d\uff0b\uff0d\uff20])")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:inf|nan)", re.ASCII | re.I)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table with a header; ``None`` and missing values are empty, other keys are left out.

    Args:
        columns: Keys of the rows, in order.
        rows: Texts and numbers by key.
    """
    lines = [_line(columns)]
    lines += [_line([row.get(name) for name in columns]) for row in rows]
    return "".join(lines)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes ``csv_text`` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(csv_text(columns, rows), encoding="utf-8", errors=_ERRORS, newline="")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, as they were before ``write_csv``; any table with a header will do.

    Raises:
        OSError, UnicodeDecodeError, csv.Error: It cannot be read.
    """
    with path.open(newline="", encoding="utf-8-sig", errors=_ERRORS) as file:
        return [
            {key: _text(value) for key, value in row.items() if isinstance(value, str)}
            for row in csv.DictReader(file)
        ]


def _line(values: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow([_cell(value) for value in values])
    # With its own end of lines, the writer quotes cells with \r as well as those with \n.
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
