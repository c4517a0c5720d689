"""The page: one file, no network, no script, whatever text it is given."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from beit.report import Page
from beit.visualize import img_tag, line_chart

NASTY = '<script>alert("x")</script> & \'quotes\' <img src="http://evil.example/x.png"> 猫'
VOID = {"meta", "img", "br", "hr", "line", "polyline"}


class Reader(HTMLParser):
    """Collects elements, their attributes and text; knows whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(words: str = NASTY) -> Page:
    one = Page(f"title {words}", f"lead {words}")
    one.section(f"section {words}", f"text {words}")
    one.table(("name", f"head {words}"), [["row", f"cell {words}"], ["other", 3.5]])
    one.figure(img_tag(Image.new("RGB", (2, 2)), words), f"caption {words}")
    one.charts([line_chart({words: [(0.0, 1.0)], "b": [(1.0, 2.0)]}, words, words)] * 2)
    one.code(f"code {words}")
    return one


def test_every_text_is_shown_as_it_is_and_none_as_html() -> None:
    read = Reader(page().html())
    for part in ("title", "lead", "section", "text", "head", "cell", "caption", "code"):
        assert f"{part} {NASTY}" in read.text, part
    assert "script" not in read.tags
    assert read.tags.count("img") == 1


def test_every_element_is_closed() -> None:
    assert Reader(page().html()).open == []


def test_the_page_needs_no_network_and_runs_no_script() -> None:
    text = page().html()
    read = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(read.tags)
    for name, value in read.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert value.startswith("data:"), value
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_page_names_no_address() -> None:
    addresses = re.findall(r"https?://[^\s\"']*|(?<=[\"'(])//[^\s\"']*", page("plain words").html())
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}


def test_the_page_is_a_whole_document_for_phone_and_dark() -> None:
    text = page().html()
    assert text.startswith("<!doctype html>")
    assert 'charset="utf-8"' in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert text.rstrip().endswith("</html>")


def test_parts_stand_in_the_order_they_were_given() -> None:
    one = Page("t", "l")
    one.section("first")
    one.code("second")
    one.table(["third"], [["fourth"]])
    places = [one.html().index(word) for word in ("first", "second", "third", "fourth")]
    assert places == sorted(places)


def test_a_section_without_text_has_no_empty_paragraph() -> None:
    one = Page("t", "l")
    one.section("only a heading")
    assert "<p></p>" not in one.html()


def test_writing_gives_the_page_in_utf8(tmp_path: Path) -> None:
    page().write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page().html()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("value", [0, 1.5, None, True, Path("a/b")])
def test_a_cell_may_be_anything(value: object) -> None:
    one = Page("t", "l")
    one.table(["a"], [[value]])
    assert f"<td>{value}</td>" in one.html()
