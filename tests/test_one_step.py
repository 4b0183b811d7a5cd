"""The page "one step": its arithmetic is the operators', and its controls do what they say. In a real Chromium."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Tab

import advance_step

SCRIPTS = Path(__file__).parent.parent / "docs" / "one_step"
NAMES = ["inputTokens", "inputPositions", "seqLens", "slotMapping"]
PLAIN = ["advance_step_flashattn", "npu_advance_step_flashattn"]
CASES = 400


@pytest.fixture
def scripts(tab: Tab) -> Tab:
    tab.page.goto("about:blank")
    tab.page.add_script_tag(path=SCRIPTS / "step.js")
    return tab


def drawn(draw: random.Random) -> dict[str, Any]:
    """A batch as the page has them; now and then a position outside of its table, or a page that is missing."""
    rows, width, block_size = draw.randrange(1, 6), draw.randrange(1, 5), draw.randrange(1, 9)
    most = width * block_size + (draw.random() < 0.2)
    return {
        "blockSize": block_size,
        "sampled": [draw.randrange(20) for _ in range(rows)],
        "state": {
            "inputTokens": [draw.randrange(100) for _ in range(rows)],
            "inputPositions": [draw.randrange(100) for _ in range(rows)],
            "seqLens": [draw.randrange(max(most, 1)) for _ in range(rows)],
            "slotMapping": [draw.randrange(-1, 100) for _ in range(rows)],
            "blockTables": [[draw.randrange(-1, 50) for _ in range(width)] for _ in range(rows)],
        },
    }


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in state.items()}


@pytest.mark.parametrize("operator", PLAIN)
def test_a_step_is_the_operators(scripts, operator):
    draw = random.Random(0)
    cases = [drawn(draw) for _ in range(CASES)]
    for case in cases:
        case["numQueries"] = draw.randrange(0, len(case["sampled"]) + 1)
    script = "cases => cases.map(c => advanceStep(c.operator, c.state, c.sampled, c.numQueries, c.blockSize))"
    answers = scripts.page.evaluate(script, [case | {"operator": operator} for case in cases])
    refused = 0
    for case, answer in zip(cases, answers, strict=True):
        held, rows, live = tensors(case["state"]), len(case["sampled"]), case["numQueries"]
        sampled = torch.tensor(case["sampled"][:live], dtype=torch.int64)
        tensors_of = [held[name] for name in NAMES]
        tokens, rest, tables = tensors_of[0], tensors_of[1:], held["blockTables"]
        try:
            if operator == PLAIN[0]:
                advance_step.advance_step_flashattn(rows, live, case["blockSize"], tokens, sampled, *rest, tables)
            else:
                advance_step.npu_advance_step_flashattn(
                    tokens, sampled[:, None], *rest, tables, rows, live, case["blockSize"]
                )
        except ValueError as error:
            assert answer == {"error": str(error).splitlines()[0]}
            refused += 1
        else:
            assert answer["state"] == {name: tensor.tolist() for name, tensor in held.items()}
    assert 5 < refused < CASES - 50


def test_a_step_until_stop_is_the_operators(scripts):
    draw = random.Random(1)
    cases = []
    for _ in range(CASES):
        case = drawn(draw)
        rows, recorded = len(case["sampled"]), draw.randrange(1, 5)
        case["stopTokenIds"] = [draw.randrange(20) for _ in range(draw.randrange(3))]
        case["state"] |= {
            "status": [draw.choice([0, 0, 0, 0, 1, 2, 3, 4]) for _ in range(rows)],
            "outputTokens": [[0] * recorded for _ in range(rows)],
            "numGenerated": [draw.randrange(recorded + 1) for _ in range(rows)],
            "maxSeqLens": [draw.randrange(1, 40) for _ in range(rows)],
        }
        cases.append(case)
    script = "cases => cases.map(c => advanceUntilStop(c.state, c.sampled, c.blockSize, c.stopTokenIds).state)"
    answers = scripts.page.evaluate(script, cases)
    seen = set()
    for case, answer in zip(cases, answers, strict=True):
        held = tensors(case["state"])
        status = held["status"] = held["status"].to(torch.int32)
        advance_step.advance_until_stop(
            held["inputTokens"], torch.tensor(case["sampled"]), held["inputPositions"], held["seqLens"],
            [held["slotMapping"]], [held["blockTables"]], [case["blockSize"]], status, held["outputTokens"],
            held["numGenerated"], torch.tensor(case["stopTokenIds"], dtype=torch.int64), held["maxSeqLens"],
        )  # fmt: skip
        assert answer == {name: tensor.tolist() for name, tensor in held.items()}
        seen |= set(zip(case["state"]["status"], status.tolist(), strict=True))
    assert {(0, 0), (0, 1), (0, 2), (0, 3), (4, 4)} <= seen


@pytest.fixture
def opened(tab: Tab, tmp_path: Path) -> Tab:
    """The page itself, without the site around it."""
    html = '<!doctype html><meta charset=utf-8><div id="one-step"></div>'
    html += "".join(f'<script src="{(SCRIPTS / name).as_uri()}"></script>' for name in ("step.js", "page.js"))
    (tmp_path / "page.html").write_text(html)
    tab.page.goto((tmp_path / "page.html").as_uri())
    return tab


def test_the_page_takes_steps(opened: Tab):
    page = opened.page
    assert [page.inner_text(f"#{name}-0") for name in NAMES] == ["11", "5", "6", str(3 * 4 + 1)]
    assert "next" in page.get_attribute("#slot-13", "class")
    page.click("#step")
    assert [page.inner_text(f"#{name}-0") for name in NAMES] == ["21", "6", "7", str(3 * 4 + 2)]
    page.click("#reset")
    assert page.inner_text("#inputTokens-0") == "11"
    assert (opened.errors, opened.network) == ([], [])


def test_the_page_refuses_as_the_operator_does(opened: Tab):
    page = opened.page
    page.fill('[aria-label="seq_lens[1]"]', "12")
    page.press('[aria-label="seq_lens[1]"]', "Tab")
    expected = "seq_lens: expected 0 <= position < W * block_size with block_tables [4, W], W=3, block_size=4"
    assert expected in page.inner_text("#refusal") and page.is_disabled("#step")
    page.select_option('[aria-label="operator"]', "npu_advance_step_flashattn")
    page.fill('[aria-label="num_queries"]', "4")
    page.press('[aria-label="num_queries"]', "Tab")
    assert page.inner_text("#refusal").endswith("expected num_queries < num_seqs with num_seqs=4, got 4")
    assert opened.errors == []


def test_the_page_stops_rows(opened: Tab):
    page = opened.page
    page.select_option('[aria-label="operator"]', "advance_until_stop")
    found = [page.inner_text(f"#status-{row}") for row in range(4)]
    assert found == ["RUNNING", "STOPPED", "RUNNING", "PADDING"]
    page.click("#step")
    page.click("#step")
    assert page.inner_text("#status-2") == "NO_PAGE" and page.inner_text("#slotMapping-2") == "-1"
    page.fill('[aria-label="stop_token_ids"]', "33")
    page.press('[aria-label="stop_token_ids"]', "Tab")
    assert opened.errors == []
