"""The documents: their Python runs, their links lead somewhere, and what they say of an operator is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
from calls import CALLS, function, name_of
from test_errors import REFUSALS

import advance_step

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OPERATORS = [name for name in advance_step.__all__ if hasattr(torch.ops.advance_step, name)]
OPERATOR_PAGES = [DOCS / f"{name}.md" for name in OPERATORS] + [
    page for page in sorted((DOCS / "zh").glob("*.md")) if page.stem in OPERATORS
]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
EVERY_PAGE = sorted(page for place in PLACES for page in ROOT.glob(place))
TRANSLATED = sorted((DOCS / "zh").glob("*.md"))

BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)\"""")
WRITTEN = {"in": False, "in/out": True, "输入": False, "输入/输出": True}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def script(text: str) -> str:
    """The Python of a page, every line where it stands on the page."""
    lines, end = "", 0
    for block in BLOCK.finditer(text):
        if not block[1]:
            lines += "\n" * text.count("\n", end, block.start(2)) + block[2]
            end = block.end(2)
    return lines


def cells(page: Path) -> list[list[str]]:
    """The rows of the page's tables."""
    return [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]


def anchors(page: Path) -> set[str]:
    """What a link can point to within a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in EVERY_PAGE if script(p.read_text()) and p not in TRANSLATED], ids=named)
def test_python_of_a_page_runs(page, tmp_path):
    """In a process of its own: emulation, once on, stays on. A translation's is the same: see the next test."""
    code = tmp_path / page.name
    code.write_text(script(page.read_text()))
    run = subprocess.run([sys.executable, code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, f"{named(page)}:\n{run.stderr}"


@pytest.mark.parametrize("page", TRANSLATED, ids=named)
def test_translation_has_the_same_python(page):
    """But for its comments."""
    ours, original = (
        [ast.unparse(ast.parse(block[2])) for block in BLOCK.finditer(p.read_text())] for p in (page, DOCS / page.name)
    )
    assert ours == original


def test_no_python_escapes_the_run():
    texts = {named(page): page.read_text() for page in EVERY_PAGE}
    found = {name: [block[1] for block in BLOCK.finditer(text)] for name, text in texts.items()}
    for name, text in texts.items():
        assert len(re.findall(r"^\s*(?:```|~~~)\s*py", text, re.MULTILINE | re.IGNORECASE)) == len(found[name]), name
    not_run = [name for name, marks in found.items() for mark in marks if mark]
    assert len(not_run) <= 3, f"too many blocks are marked as not run: {not_run}"


@pytest.mark.parametrize("page", EVERY_PAGE, ids=named)
def test_links_lead_somewhere(page):
    links = [a or b for a, b in LINK.findall(page.read_text())]
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{named(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{named(page)}: {link}"


@pytest.mark.parametrize("page", OPERATOR_PAGES, ids=named)
def test_page_has_the_operators_schema(page):
    schema = getattr(torch.ops.advance_step, page.stem).default._schema
    called = str(schema).replace("::", ".").replace("SymInt", "int")  # which callers pass; a compiler may pass more
    assert f"\n```\n{called}\n```\n" in page.read_text()
    table = [(row[0], WRITTEN[row[1]]) for row in cells(page) if len(row) > 1 and row[1] in WRITTEN]
    assert table == [(argument.name, argument.is_write) for argument in schema.arguments]


def messages(operator: str) -> set[str]:
    """What the operator says to each bad value of the errors' tests, of those it has an argument for."""
    arguments = {a.name for a in getattr(torch.ops.advance_step, operator).default._schema.arguments}
    calls = [call for call in CALLS if name_of(call) == operator]
    said = set()
    for call, (_, argument, value, *_) in product(calls, REFUSALS):
        if argument in arguments:
            try:
                function(call)(**CALLS[call]() | {argument: deepcopy(value)})  # it may be accepted, and written
            except ValueError as error:
                said.add(str(error).splitlines()[0].removeprefix(f"{operator}: "))
    return said


@pytest.mark.parametrize("page", OPERATOR_PAGES, ids=named)
def test_messages_of_a_page_are_the_operators(page):
    quoted = {row[-1].strip("`") for row in cells(page) if ": expected " in row[-1]}
    assert len(quoted) >= 3
    unsaid = quoted - messages(page.stem)
    assert not unsaid


def test_index_lists_every_page():
    index = (DOCS / "README.md").read_text()
    missing = [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name}" not in index]
    assert not missing


def test_the_drawings_are_what_their_script_draws(tmp_path):
    """Their numbers are the operators'."""
    run = subprocess.run([sys.executable, DOCS / "_build" / "drawings.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "images").glob("*.svg")} and len(drawn) == 8


def test_the_site_is_built_without_a_warning(tmp_path):
    """As `make docs` builds it; with what the pages link to outside of docs/, and a page for every function."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "reference.html").read_text()
    assert all(f'id="advance_step.ops.{name}"' in reference for name in OPERATORS)
    assert (tmp_path / "benchmarks/results/operator-cpu-2026-11-26.png").exists()
    assert (tmp_path / "one_step/page.js").exists()


def example_states(page: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The tensors of a page's first example, before the call and after it; of a loop, its first four steps."""
    before: dict[str, object] = {}
    namespace: dict[str, object] = {}
    block = next(BLOCK.finditer(page.read_text()))[2]
    for statement in ast.parse(block).body:
        calls = isinstance(statement, ast.Expr) and page.stem in ast.unparse(statement)
        if calls or isinstance(statement, ast.While):
            before = {name: value.tolist() for name, value in namespace.items() if isinstance(value, torch.Tensor)}
            exec("steps()" if isinstance(statement, ast.While) else ast.unparse(statement), namespace)
            break
        exec(ast.unparse(statement), namespace)
    return before, {name: value.tolist() for name, value in namespace.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("page", OPERATOR_PAGES, ids=named)
def test_the_table_of_an_example_is_what_it_does(page):
    before, after = example_states(page)
    rows = [row for row in cells(page) if len(row) == 3 and row[1].startswith("`[")]
    assert len(rows) >= 3
    for name, *values in rows:
        assert [ast.literal_eval(value.strip("`")) for value in values] == [before[name], after[name]], name
    written = {name for name in before if before[name] != after[name]}
    assert written <= {name for name, *_ in rows}
