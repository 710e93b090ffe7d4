"""Repairs of one text, each with a name, so that the count of texts it changed can be shown."""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable
from html.entities import html5

# Only complete references (a bare "&copy" is more often part of an address); Reddit escapes numeric ones twice.
_ENTITY = re.compile(r"&(?:amp;)?#(?:\d{1,7}|[xX][0-9a-fA-F]{1,6});|&[a-zA-Z][a-zA-Z0-9]{1,31};")
_CITATION = re.compile(r"[ \t]*\[\d+(?:,\s*\d+)*\]")
_BREAK = re.compile(r"\r\n?|\u2028|\x85")
_PARAGRAPH = "\u2029"


def _decode(entity: re.Match[str]) -> str:
    text = entity.group().replace("&amp;#", "&#")
    if not text.startswith("&#"):
        return html5.get(text[1:], text)  # html.unescape would also take the &not of "&nothing;"
    return html.unescape(text)


def html_entities(text: str) -> str:
    """Character references such as &amp; and &#x27; decoded, once; non-breaking spaces become spaces."""
    if "&" not in text:
        return text
    return _ENTITY.sub(lambda entity: _decode(entity).replace("\xa0", " ").replace("\u200b", ""), text)


def citations(text: str) -> str:
    """WebGPT's citation marks such as [1] and [2, 3] removed; any other bracket is text."""
    return _CITATION.sub("", text) if "[" in text else text


def line_ends(text: str) -> str:
    """Every kind of line end as a newline."""
    return _BREAK.sub("\n", text).replace(_PARAGRAPH, "\n\n")


def nfc(text: str) -> str:
    """Unicode's composed form."""
    return unicodedata.normalize("NFC", text)


REPAIRS: dict[str, Callable[[str], str]] = {
    "html_entities": html_entities,
    "citations": citations,
    "line_ends": line_ends,
    "nfc": nfc,
}


def repair(text: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """The text after the named repairs, and the names of those that changed it."""
    changed = []
    for name in names:
        repaired = REPAIRS[name](text)
        if repaired != text:
            changed.append(name)
        text = repaired
    return text, changed
