"""Words of others in Markdown, read back by a parser that knows the usual extensions."""

import re

import pytest
from markdown_it import MarkdownIt

from weakseg.markdown import code_block, plain

TEXTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "*x* **y** _z_ __init__ res_net_50",
    "[a](http://x.example)",
    "![a](javascript:alert)",
    "[a]: x",
    "`code` ``x``",
    "# h",
    "- a",
    "+ a",
    "1. a",
    "12) a",
    "===",
    "---",
    "> a",
    "&lt;b&gt; &amp;",
    "~~a~~",
    "$x$ $$y$$",
    "C:\\x\\|y",
    "<http://x.example>",
    "a\\",
    "\\",
]
BREAKS = ["a\nb", "a\r\n# b", "a\n\n| b |", "a\u2028b", "\ta"]


def shown(source: str) -> tuple[str, set[str]]:
    """Text and tags of a page."""
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source)
    text = re.sub(r"<[^>]*>", "", html)
    tags = set(re.findall(r"<(\w+)", html))
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, letter)
    return text.strip("\n"), tags


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_shown_as_they_are(text: str):
    assert shown(plain(text)) == (text, {"p"})


@pytest.mark.parametrize("text", [*TEXTS, *BREAKS])
def test_a_cell_stays_one_cell_of_text(text: str):
    found, tags = shown(f"| a | b |\n|---|---|\n| {plain(text)} | last |")
    assert tags == {"table", "thead", "tbody", "tr", "th", "td"}
    line = " ".join(text.split())
    assert [t for t in found.split("\n") if t] == ["a", "b", line, "last"]


@pytest.mark.parametrize("text", [*TEXTS, *BREAKS])
def test_an_item_stays_one_item_of_text(text: str):
    found, tags = shown(f"* {plain(text)}\n* last")
    assert tags == {"ul", "li"}
    assert [t for t in found.split("\n") if t] == [" ".join(text.split()), "last"]


@pytest.mark.parametrize("text", ["http://x.example", "see https://x.example/a", "www.x.example"])
def test_addresses_are_no_links(text: str):
    """GitHub and the hub make links of them; no parser here does."""
    assert not re.search(r"https?://|www\.", plain(text))
    assert shown(plain(text))[0] == text


def test_control_characters_are_visible():
    assert shown(plain("a\x1b[31mb\u202ec\0"))[0] == "a\\u001b[31mb\\u202ec\\u0000"


@pytest.mark.parametrize("text", ["a", "<b>", "```\n<script>\n```", "````", "* a"])
def test_nothing_closes_a_block_of_code(text: str):
    found, tags = shown(f"* item\n\n{code_block(text)}\n\nend")
    assert tags == {"ul", "li", "pre", "code", "p"}
    assert text in found
