"""Tables that a spreadsheet may open: nothing in them runs, and numbers stay numbers."""

import csv
from pathlib import Path

import pytest

from weakseg.csvfile import csv_text, read_csv, write_csv

RUNS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "-rf",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "＝1+1",
    "＋1",
    "－1a",
    "＠x",
    '=HYPERLINK("http://example.com","x")',
]
PLAIN = ["cat", "a=b", "a-1", "'quoted'", "", "cat, dog", 'a "b"', "ä", "1", "100%", "a\nb", "''"]
NUMBERS = [-0.5, 3, -7, 1e-9, "-0.1234", "+5", "-1e-5", "-.5", "nan", "-inf"]


def cells(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["value"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("text", RUNS)
def test_no_cell_is_a_formula(text: str, tmp_path: Path):
    file = tmp_path / "t.csv"
    write_csv(file, ["value"], [{"value": text}])
    (cell,) = cells(file)
    assert cell == "'" + text
    assert read_csv(file) == [{"value": text}]


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_are_written_as_they_are(value: float | str, tmp_path: Path):
    file = tmp_path / "t.csv"
    write_csv(file, ["value"], [{"value": value}])
    assert cells(file) == [str(value)]


@pytest.mark.parametrize("text", [*PLAIN, *RUNS, *("'" + text for text in RUNS), "''=1"])
def test_what_is_written_is_read(text: str, tmp_path: Path):
    file = tmp_path / "t.csv"
    write_csv(file, ["other", "value"], [{"value": text, "other": "x"}])
    assert read_csv(file) == [{"other": "x", "value": text}]


def test_names_that_are_no_utf8_are_kept(tmp_path: Path):
    name = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    file = tmp_path / "t.csv"
    write_csv(file, ["value"], [{"value": name}])
    assert read_csv(file) == [{"value": name}]


def test_columns_choose_and_none_is_empty():
    text = csv_text(["b", "=a"], [{"b": 1, "c": 2}, {"b": None, "=a": 0.25}])
    assert text == "b,'=a\n1,\n,0.25\n"
