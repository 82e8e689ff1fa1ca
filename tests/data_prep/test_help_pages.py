"""What a reader sees of a page of the help."""

from __future__ import annotations

import pytest

from data_prep.help_pages import paragraphs

MENU, FOOT = "<html><body><p>Menu</p>", "<p>Foot</p></body></html>"
PAGE = MENU + '<div id="DisplayArea">{}</div><div id="SearchFrame"></div>' + FOOT


def texts(html: str, folder: str = "swriter") -> list[str]:
    return list(paragraphs(PAGE.format(html), folder).values())


def switch(kind: str, **forms: str) -> str:
    """A switch as the help has them; the default form has no class."""
    spans = (
        f'<span hidden="true" id="{form}x"{"" if form == "default" else f" class={form!r}"}>{text}</span>'
        for form, text in forms.items()
    )
    return f'<span id="swlnsysx" class="{kind}">{"".join(spans)}</span>'


PREFERENCES = "<span class='emph'>LibreOffice - Preferences</span>"
OPTIONS = "<span class='emph'>Tools - Options</span>"


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("Choose <span class='emph'>File</span><span> - Open</span>.", "Choose File - Open."),
        ("Press <span class='keycode'>Ctrl</span>+<span class='keycode'>F3</span>.", "Press Ctrl+F3."),
        ("Click <a href='x'>\n  OK</a>,\n and &amp; <img src='x' alt='Icon'>", "Click OK, and &"),
        ("The first line.<br>The second.", "The first line.\nThe second."),
        (
            "Choose " + switch("switchinline", MAC=PREFERENCES, default=OPTIONS) + ".",
            "Choose Tools - Options.",
        ),
        ("It is " + switch("switchinline", UNIX="here", MAC="there", default="gone") + ".", "It is here."),
        ("It is" + switch("switchinline", WIN=" on Windows") + " here.", "It is here."),
        ("The " + switch("switchinline", WRITER="text", CALC="sheet") + " opens.", "The text opens."),
        ("The " + switch("switchinline", CALC="sheet", default="file") + " opens.", "The file opens."),
        (
            "See " + switch("switchinline", MAC="a " + switch("switchinline", WRITER="b"), default="c") + ".",
            "See c.",
        ),
    ],
)
def test_markup_becomes_what_a_reader_sees_on_linux(html, expected):
    assert texts(f"<p id='par_1'>{html}</p>") == [expected]


@pytest.mark.parametrize(
    ("folder", "expected"), [("scalc", "The sheet."), ("simpress", "The file."), ("shared", "The text.")]
)
def test_the_form_is_that_of_the_application_that_the_page_is_about(folder, expected):
    html = f"<p>The {switch('switchinline', WRITER='text', CALC='sheet', default='file')}.</p>"
    assert texts(html, folder) == [expected]


def test_of_whole_paragraphs_only_those_for_macos_are_left_out():
    paragraphs = {"MAC": "<p>a</p>", "WIN": "<p>b</p>", "CALC": "<p>c</p><p>d</p>", "default": "<p>e</p>"}
    assert texts(switch("switch", **paragraphs)) == ["b", "c", "d", "e"]


def test_code_menus_and_the_foot_of_the_page_are_left_out():
    html = "<p class='code'>x = 1</p><pre><code>Sub A</code></pre><p>Use <span class='code'>math</span>.</p>"
    assert texts(html) == ["Use math."]
    assert texts("<noscript><p>Enable JavaScript.</p></noscript><h1>Title</h1>") == ["Title"]


def test_a_place_is_an_id_and_a_number_among_the_paragraphs_that_have_it_or_follow_it():
    html = (
        "<h1 id='hd_1'>Title</h1><div><p>A note.</p></div><ul><li><p id='par_1'>A.</p></li><li>B.</li></ul>"
        "<table><tr><td><p id='par_2'>C.</p></td><td><p id='par_2'>D.</p></td></tr></table><p id='par_3'></p>"
    )
    assert paragraphs(PAGE.format(html), "shared") == {
        ("hd_1", 0): "Title",
        ("hd_1", 1): "A note.",
        ("par_1", 0): "A.",
        ("par_1", 1): "B.",
        ("par_2", 0): "C.",
        ("par_2", 1): "D.",
    }
