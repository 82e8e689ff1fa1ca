"""The text of a page of LibreOffice's help, paragraph by paragraph."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

# Around it stand menus and scripts, the same on all pages.
TEXT = re.compile(r'<div id="DisplayArea".*?(?=<div id="(?:SearchFrame|DonationFrame)")', re.DOTALL)
PARAGRAPHS = {"p", "h", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "th"}
WITHOUT_END = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}
LEFT_OUT = {"noscript", "pre"}
CODE_PARAGRAPHS = {"code", "codeintable", "smathcode"}
#: What a switch calls the application that the pages of a folder are about.
APPLICATIONS = {
    "sbasic": "BASIC",
    "scalc": "CALC",
    "schart": "CHART",
    "sdatabase": "BASE",
    "sdraw": "DRAW",
    "simpress": "IMPRESS",
    "smath": "MATH",
}

#: The id of a paragraph (or of the last one before it that has one), and which paragraph with this id it is.
Place = tuple[str, int]


def paragraphs(html: str, folder: str) -> dict[Place, str]:
    """Return the text at each place of a page, in the page's order, as somebody sees it who uses Linux.

    A "switch" holds forms of a text for several systems and applications. Of one within a paragraph, the
    reader sees the form for Linux, or for the application that the folder is about (Writer for those about
    all), or else the default form. Of one around whole paragraphs, all are kept but those for macOS, because
    each is a text of its own. Code is left out.

    Args:
        html: The page.
        folder: The folder that the page is in, like "scalc".

    Returns:
        The texts, without tags. A newline stands for a line break.
    """
    page = _Page({"UNIX", APPLICATIONS.get(folder, "WRITER")})
    page.feed("".join(TEXT.findall(html)))
    page.close()
    return page.paragraphs


class _Element:
    """An open element, whether a reader sees what is in it, and, if a switch, whether a form was seen yet."""

    def __init__(self, tag: str, kind: str, seen: bool) -> None:
        self.tag, self.kind, self.seen = tag, kind, seen
        self.form_seen = False


class _Page(HTMLParser):
    def __init__(self, reader: set[str]) -> None:
        super().__init__()
        self.paragraphs: dict[Place, str] = {}
        self._reader = reader
        self._open = [_Element("", "", True)]
        self._id = ""
        self._numbers: Counter[str] = Counter()
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in PARAGRAPHS:
            self._end_paragraph()
            self._id = attributes.get("id") or self._id
        if tag == "br":
            self._text.append("\n")
        if tag not in WITHOUT_END:
            kind = attributes.get("class") or ""
            self._open.append(_Element(tag, kind, self._is_seen(tag, kind)))

    def _is_seen(self, tag: str, kind: str) -> bool:
        parent = self._open[-1]
        if parent.kind == "switchinline":
            seen = kind in self._reader or not (kind or parent.form_seen)  # the default has no class
            parent.form_seen |= seen
        elif parent.kind == "switch":
            seen = kind != "MAC"
        else:
            seen = tag not in LEFT_OUT and not (tag == "p" and kind in CODE_PARAGRAPHS)
        return parent.seen and seen

    def handle_endtag(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self._end_paragraph()
        while len(self._open) > 1 and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1].seen:
            self._text.append(re.sub(r"\s+", " ", data))

    def _end_paragraph(self) -> None:
        lines = (" ".join(line.split()) for line in "".join(self._text).split("\n"))
        self._text.clear()
        if text := "\n".join(filter(None, lines)):
            self.paragraphs[self._id, self._numbers[self._id]] = text
            self._numbers[self._id] += 1
