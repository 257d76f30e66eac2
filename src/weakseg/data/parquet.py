"""Columns of a Parquet file as plain Python values; needs the extra ``weakseg[parquet]``.

Only the columns that are asked for are read: such files may hold the images themselves too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weakseg.errors import UserError

__all__ = ["Column", "read_columns"]

_MEND = "write it again, or give the tags as a CSV table"


@dataclass(frozen=True)
class Column:
    """A column that has not been read yet.

    Attributes:
        name: Its name.
        kind: ``text``; ``tags``, which are lists of text; ``numbers``, which may be truth values;
            or ``other``.
        type: Its type in words of Parquet.
    """

    name: str
    kind: Literal["text", "tags", "numbers", "other"]
    type: str
    file: Any
    path: Path

    def values(self) -> list[Any]:
        """Its values by row; None where there is none.

        Raises:
            UserError: The file is damaged.
        """
        try:
            table = self.file.read(columns=[self.name], use_threads=False)
            values = list(table.column(self.name).to_pylist())
            if len(values) != self.file.metadata.num_rows:
                raise ValueError(f"{len(values)} values in column {self.name!r}")
            return values
        except Exception as error:  # decoders, checksums, text that is not UTF-8, lists of lists
            raise _damaged(self.path, error) from error


def read_columns(path: Path) -> tuple[Column, ...]:
    """The columns of a Parquet file; those whose names are not unique are left out.

    Raises:
        UserError: The file is damaged, or pyarrow is missing.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            "Parquet tables need pyarrow, which is not installed",
            where=path,
            mend="pip install 'weakseg[parquet]', or give the tags as a CSV table",
        ) from error
    try:
        file = parquet.ParquetFile(path)
        fields = list(file.schema_arrow)
    except Exception as error:  # many kinds, from a file that is not what it says
        raise _damaged(path, error) from error
    names = [field.name for field in fields]
    return tuple(
        Column(field.name, _kind(field.type), str(field.type), file, path)
        for field in fields
        if names.count(field.name) == 1
    )


def _kind(dtype: Any) -> Literal["text", "tags", "numbers", "other"]:
    import pyarrow.types as types

    if types.is_dictionary(dtype):
        dtype = dtype.value_type
    if _is_text(dtype):
        return "text"
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        inner = dtype.value_type
        inner = inner.value_type if types.is_dictionary(inner) else inner
        return "tags" if _is_text(inner) or types.is_null(inner) else "other"
    if types.is_boolean(dtype) or types.is_integer(dtype) or types.is_floating(dtype):
        return "numbers"
    return "other"


def _is_text(dtype: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype)


def _damaged(path: Path, error: Exception) -> UserError:
    detail = str(error).split("\n", 1)[0][:200] or type(error).__name__
    return UserError(f"the Parquet file cannot be read ({detail})", where=path, mend=_MEND)
