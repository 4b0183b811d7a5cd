"""The page of --report: what it says, when it is written, and how a browser shows it."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Tab
from simulated import simulate

from advance_step.generate.job import generate
from advance_step.generate.report.page import Facts, duration, render
from advance_step.generate.settings import Settings

MEGABYTE = 1_000_000
FACTS = Facts(
    model="model",
    input="in.jsonl",
    begun="2026-01-01 00:00:00",
    ended="finished",
    why="",
    finished=10_000,
    failed=0,
    earlier=0,
    total=10_000,
    settings={"--stop": "['<b>&']", "--model": "/" + 30 * "directory/"},
    versions={"torch": "2"},
)


def settings(tiny: Path, **options: object) -> Settings:
    defaults = {"model": str(tiny), "dtype": "float32", "sampling": {"max_new_tokens": 6, "seed": 0}, "batch_size": 2}
    return Settings(**defaults | options)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(7)))
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of simulated runs: a long one, a short one, one of one request, one that was broken off."""
    directory = tmp_path_factory.mktemp("pages")
    short = replace(FACTS, finished=5, total=5)
    broken = replace(FACTS, ended="interrupted", why="it was interrupted (Ctrl-C)", earlier=3, failed=1)
    made = {
        "one": render(short, simulate(1, batch_size=1, drafts=False)),
        "long": render(FACTS, simulate(10_000)),
        "short": render(short, simulate(5, batch_size=8, drafts=False)),
        "broken": render(broken, simulate(200, batch_size=8, stop_after=300)),
    }
    for name, page in made.items():
        (directory / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: directory / f"{name}.html" for name in made}


def text_of(path: Path) -> str:
    """What a page says, without its charts."""
    page = re.sub(r"<(svg|style)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def tile(path: Path, name: str) -> str:
    """The value of a tile, and what stands below it."""
    found = re.search(rf"<dt>{name}</dt><dd>(.*?)<small>(.*?)</small>", path.read_text(encoding="utf-8"))
    assert found, name
    return f"{found[1]} {found[2]}".strip()


def test_ten_thousand_requests_are_less_than_a_megabyte(pages):
    assert pages["long"].stat().st_size < MEGABYTE
    assert "1,500 of 10,0" in text_of(pages["long"])  # admissions: that not all are drawn is said


def test_many_rows_and_a_sample_are_less_than_a_megabyte_too():
    recorder = simulate(12_000, batch_size=512, drafts=False)
    page = render(FACTS, recorder)
    assert len(page.encode()) < MEGABYTE
    assert "Latencies and lengths are those of 10,000 requests, drawn at random from 12,000 finished requests." in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("name", ["long", "short", "one", "broken"])
def test_a_browser_shows_it(tab: Tab, pages, name, width, scheme):
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.page.emulate_media(color_scheme=scheme)
    tab.page.goto(pages[name].as_uri())
    assert (tab.errors, tab.network) == ([], [])
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    charts = tab.page.locator("svg")
    assert charts.count() == {"long": 11, "short": 8, "one": 8, "broken": 10}[name]
    assert all(chart.bounding_box()["height"] > 100 for chart in charts.all())
    assert tab.page.evaluate(OVERLAPS) == []
    lowest = tab.page.evaluate(LOWEST_CONTRAST)
    assert lowest["text"] >= 4.5 and lowest["marks"] >= 3, lowest  # WCAG 2: text, and what is drawn
    assert (lowest["surface"] > 0.5) == (scheme == "light")


# Pairs of labels of one chart that share a part of the screen.
OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const labels = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  return labels.flatMap(([a, p], i) => labels.slice(i + 1)
    .filter(([, q]) => p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom)
    .map(([b]) => `${a} / ${b}`));
})"""

# The lowest contrast with the surface below of a text, and of what a chart draws with; and the surface's luminance.
LOWEST_CONTRAST = """() => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const surface = luminance(getComputedStyle(document.querySelector("figure")).backgroundColor);
  const contrast = colour => {
    const [low, high] = [luminance(colour), surface].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const probe = document.body.appendChild(document.createElement("i"));
  const variable = name => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  const texts = [...document.querySelectorAll("dt, dd, td, th, p, h2, h3, .badge")].map(e => getComputedStyle(e).color);
  const labels = [...document.querySelectorAll("svg text")].map(e => getComputedStyle(e).fill);
  return {
    text: Math.min(...[...texts, ...labels].map(contrast)),
    marks: Math.min(...["--first", "--second"].map(name => contrast(variable(name)))),
    surface,
  };
}"""


def test_what_a_page_says_of_a_run_that_was_broken_off(pages):
    said = text_of(pages["broken"])
    assert "Interrupted" in said and "it was interrupted (Ctrl-C). The page shows what was done until then." in said
    assert "the 3 lines of earlier runs are not on this page" in said and "1 line failed" in said
    assert "['<b>&']" in said  # as it stands


def test_durations_for_a_reader():
    said = [duration(seconds) for seconds in (0.0123, 0.5, 2, 61.25, 200, 7321, 100_000)]
    assert said == ["12.3 ms", "500 ms", "2 s", "61.2 s", "3 min 20 s", "122 min 1 s", "27 h 46 min"]


def test_a_page_of_the_job(tiny, prompts, tmp_path, capsys):
    """Few pages, so that rows are put back; the figures are those of the results."""
    page, output = tmp_path / "new" / "page.html", tmp_path / "out.jsonl"
    options = {"sampling": {"max_new_tokens": 30, "seed": 0}, "batch_size": 4, "block_size": 4, "num_pages": 18}
    assert generate([], str(prompts), str(output), False, settings(tiny, **options), str(page)) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"report: {page}"
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert tile(page, "Prompts finished") == "7 of 7"
    assert tile(page, "Tokens generated") == f"{sum(line['tokens'] for line in results):,}"
    assert int(tile(page, "Preemptions")) > 0
    assert tile(page, "Most pages in use").endswith("of 18")
    said = text_of(page)
    assert "Finished" in said and f"--model {tiny}" in said and "--max-new-tokens 30" in said and "Put back" in said
    assert not page.with_name("page.html.part").exists()


def test_drafts_are_reported(tiny, prompts, tmp_path):
    page = tmp_path / "page.html"
    options = {"draft_tokens": 2, "sampling": {"max_new_tokens": 80, "seed": 0}}
    assert generate([], str(prompts), "-", False, settings(tiny, **options), str(page)) == 0
    assert "Draft acceptance" in text_of(page)


def test_an_interrupted_job_and_its_continuation(tiny, prompts, tmp_path, monkeypatch):
    """Ctrl-C before the third result is written; the second page replaces the first one."""
    from advance_step.generate import outputs

    page, output, write, written = tmp_path / "page.html", tmp_path / "out.jsonl", outputs.Output.write, []

    def interrupted(self, entry) -> None:
        written.append(entry)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, entry)

    with monkeypatch.context() as patched:
        patched.setattr(outputs.Output, "write", interrupted)
        assert generate([], str(prompts), str(output), False, settings(tiny), str(page)) == 130
    assert "it was interrupted (Ctrl-C)" in text_of(page) and tile(page, "Prompts finished") == "2 of 7"
    assert generate([], str(prompts), str(output), True, settings(tiny), str(page)) == 0
    assert "the 2 lines of earlier runs are not on this page" in text_of(page)
    assert tile(page, "Prompts finished") == "5"
    assert generate([], str(prompts), str(output), True, settings(tiny), str(page)) == 0
    assert "Nothing was decoded." in text_of(page)


def test_a_job_that_fails(tiny, prompts, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(OSError, match="No space left"):
        generate([], str(prompts), "/dev/full", False, settings(tiny), str(page))
    said = text_of(page)
    assert "Failed" in said and "No space left on device" in said and tile(page, "Prompts finished") == "0 of 7"


def test_paths_that_are_refused_before_anything_is_loaded(prompts, tmp_path, tmp_path_factory):
    """The model is one that could not be loaded."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text("{}")
    notes, output = tmp_path / "notes.html", tmp_path / "out.jsonl"
    notes.write_text("<p>mine</p>")
    for path, said in [
        ("-", "expected a file, got -, which results may go to"),
        (tmp_path, f"expected a file, got {tmp_path}, a directory"),
        (prompts, f"expected another file than --input and --output, got {prompts}"),
        (output, f"expected another file than --input and --output, got {output}"),
        (f"{output}.run.json", "expected another file than --input and --output, got "),
        (notes, f"expected a new file or an earlier report, got {notes}, which is another"),
        (notes / "page.html", f"expected a path that can be written, got {notes / 'page.html'}: "),
        ("/proc/none/page.html", "expected a path that can be written, got /proc/none/page.html: "),
    ]:
        with pytest.raises(ValueError, match=f"--report: {re.escape(said)}"):
            generate([], str(prompts), str(output), False, settings(model), str(path))
    assert notes.read_text() == "<p>mine</p>" and sorted(tmp_path.iterdir()) == [prompts, notes]


def test_without_what_draws_it(tiny, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("advance_step.generate.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'matplotlib is not installed: pip install "advance-step\[report\]"'):
        generate(["Hi"], None, None, False, settings(tiny), "page.html")
