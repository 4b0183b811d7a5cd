"""The browser that tests look at pages with sees what goes wrong in them."""

from __future__ import annotations

from pathlib import Path

from browser import Tab


def opened(tab: Tab, path: Path, html: str) -> Tab:
    path.write_text(f"<!doctype html><meta charset=utf-8><title>page</title>{html}", encoding="utf-8")
    tab.page.goto(path.as_uri())
    return tab


def test_a_page_that_is_well(tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    opened(tab, path, '<p id="p">über</p><script>console.log("fine")</script>')
    assert tab.page.inner_text("#p") == "über"
    assert (tab.errors, tab.network) == ([], [])
    assert tab.requests == [path.as_uri()]


def test_errors_are_heard(tab: Tab, tmp_path: Path) -> None:
    opened(tab, tmp_path / "page.html", '<script>console.error("bad")</script><script>throw Error("worse")</script>')
    assert tab.errors == ["console: bad", "uncaught: worse"]


def test_requests_are_seen(tab: Tab, tmp_path: Path) -> None:
    opened(tab, tmp_path / "page.html", '<img src="http://127.0.0.1:9/a.png"><img src="there-is-none.png">')
    assert tab.network == ["http://127.0.0.1:9/a.png"]
    assert len(tab.errors) >= 2


def test_both_schemes(tab: Tab, tmp_path: Path) -> None:
    opened(tab, tmp_path / "page.html", "<style>:root { color-scheme: light dark }</style>")
    dark = "matchMedia('(prefers-color-scheme: dark)').matches"
    tab.page.emulate_media(color_scheme="light")
    assert not tab.page.evaluate(dark)
    tab.page.emulate_media(color_scheme="dark")
    assert tab.page.evaluate(dark)
