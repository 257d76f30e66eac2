"""What is done to the pages of the site: formulas become MathML, so that browsers fetch no scripts."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.pages")

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Replaces what pymdownx.arithmatex marked, and keeps a number and its spread on one line."""
    html = html.replace(" ± ", "&nbsp;±&nbsp;")
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
