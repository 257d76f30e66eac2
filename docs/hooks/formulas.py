"""Formulas of the pages as MathML, at build time: a reader's browser fetches and runs nothing."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.formulas")

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Replaces what pymdownx.arithmatex marked."""
    return _FORMULA.sub(lambda found: formula(found["latex"], found["tag"], page), html)


def formula(escaped: str, tag: str, page: Any) -> str:
    """One formula; a command that is not known is a warning, which stops a strict build."""
    # `aligned`, as other readers of these pages know it, is `split` to latex2mathml.
    latex = html.unescape(escaped).strip().replace("{aligned}", "{split}")
    mathml = convert(latex, display="block" if tag == "div" else "inline")
    unknown = re.findall(r"\\[A-Za-z]+", mathml)
    if unknown:
        log.warning("%s: formulas cannot say %s", page.file.src_uri, ", ".join(unknown))
    return f'<div class="formula">{mathml}</div>' if tag == "div" else mathml
