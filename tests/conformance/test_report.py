"""The command: processes of their own, the table and its other formats, the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advance_step.conformance import CONTRACTS, clauses
from advance_step.conformance.isolated import NotLoadedError, check_isolated
from advance_step.conformance.report import conformance


@pytest.fixture(autouse=True)
def beside_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)


def test_a_target_that_dies_fails_the_clause_and_not_the_kit() -> None:
    pending = [("eagle", name) for name in ("advances", "past-the-table", "page-boundary")]
    results = list(check_isolated("wrong:dying_eagle", pending, "cpu"))
    assert [(r.clause, r.outcome) for r in results] == [
        ("advances", "holds"),
        ("past-the-table", "FAILS"),
        ("page-boundary", "holds"),
    ]
    assert results[1].detail == "the process died: SIGABRT"


def test_a_target_that_ends_its_process_fails_every_clause() -> None:
    results = list(check_isolated("wrong:quitting_eagle", [("eagle", "advances"), ("eagle", "no-rows")], "cpu"))
    assert [(r.outcome, r.detail) for r in results] == [("FAILS", "the process ended: exit status 0")] * 2


def test_a_target_that_prints_leaves_stdout_to_the_json(capfd: pytest.CaptureFixture[str]) -> None:
    skip = [name for name in clauses("eagle") if name != "no-rows"]
    assert conformance("wrong:noisy_eagle", "eagle", skip=skip, form="json") == 0
    out, err = capfd.readouterr()
    assert [r["outcome"] for r in json.loads(out)["results"]["wrong:noisy_eagle"]].count("holds") == 1
    assert {"from Python", "past Python", "from a process"} <= set(err.splitlines())


def test_a_target_that_hangs_fails_the_clause() -> None:
    results = list(check_isolated("wrong:hanging_eagle", [("eagle", "no-rows")], "cpu", timeout=3))
    assert [r.detail for r in results] == ["the process was killed: by the system, or after 3 s without an answer"]


@pytest.mark.parametrize(
    ("target", "raised"),
    [
        ("wrong:exiting_eagle", "SystemExit: 0"),
        ("wrong:interrupting_eagle", "KeyboardInterrupt"),
        ("wrong:raising_eagle", "BaseException: odd"),
    ],
)
def test_a_target_that_raises_what_is_no_error_is_heard(target: str, raised: str) -> None:
    results = list(check_isolated(target, [("eagle", "no-rows"), ("eagle", "advances")], "cpu"))
    assert [(r.outcome, r.detail) for r in results] == [("FAILS", f"raised {raised}")] * 2


@pytest.mark.parametrize("target", ["wrong:meta_eagle", "wrong:threaded_eagle"])
def test_what_a_right_target_leaves_behind_changes_no_verdict(target: str) -> None:
    results = list(check_isolated(target, [("eagle", "advances"), ("eagle", "page-boundary")], "cpu"))
    assert [r.outcome for r in results] == ["holds", "holds"], results


def test_a_target_that_does_not_load() -> None:
    with pytest.raises(NotLoadedError, match="No module named 'no_such_module'"):
        list(check_isolated("no_such_module:f", [("eagle", "advances")], "cpu"))
    with pytest.raises(NotLoadedError, match="has no attribute 'no_such_function'"):
        list(check_isolated("wrong:no_such_function", [("eagle", "advances")], "cpu"))


def test_a_right_target_gives_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("wrong:right_eagle", "eagle", skip=["no-rows"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["eagle,", "cpu", "wrong:right_eagle"]
    for name in clauses("eagle"):
        assert ([name, "skipped", "by", "request"] if name == "no-rows" else [name, "holds"]) in lines
    total = len(clauses("eagle"))
    assert out.endswith(f"wrong:right_eagle: {total} clauses, {total - 1} hold, 0 fail, 1 skipped\n")


def test_a_wrong_target_gives_status_1_and_the_name_of_its_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("wrong:published", "npu") == 1
    out = capsys.readouterr().out
    assert "more-than-48-rows           FAILS      only row 0 has the right page + rows past N untouched (N=40)" in out
    assert "  known deviation: only row 0 has the right page (page-boundary, " in out
    assert "  known deviation: every Nth pad row cleared (several-pad-rows, padding-lengths-not-judged)" in out


def test_markdown_has_the_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("wrong:right_eagle", "eagle", form="markdown") == 0
    out = capsys.readouterr().out
    assert out.startswith("| eagle, cpu | wrong:right_eagle | found | the contract says |\n| --- | --- | --- | --- |\n")
    for clause in clauses("eagle").values():
        assert f"| {clause.name} | holds |  | {clause.sentence} |" in out


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("wrong:published", "npu", form="json") == 1
    read = json.loads(capsys.readouterr().out)
    assert (read["device"], read["not_loaded"]) == ("cpu", {})
    results = {result["clause"]: result for result in read["results"]["wrong:published"]}
    assert list(results) == list(clauses("npu"))
    assert results["one-row"]["outcome"] == "holds"
    assert results["own-row-of-the-table"] | {"detail": ""} == {
        "contract": "npu",
        "clause": "own-row-of-the-table",
        "sentence": clauses("npu")["own-row-of-the-table"].sentence,
        "outcome": "FAILS",
        "detail": "",
        "deviation": "only row 0 has the right page",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wrong:right_eagle", None), "contract: expected one of npu, .* got none"),
        (("wrong:right_eagle", "eagel"), "contract: expected one of npu, .* got 'eagel'"),
        (("wrong:right_eagle", "eagle", "cpu", ["no-row"]), "skip: expected clauses of eagle: .* got no-row"),
        (("wrong:right_eagle", "eagle", "cpu", [], "html"), "format: expected one of table, json, .* got 'html'"),
        (("wrong:no_such_function", "eagle"), "wrong:no_such_function was not loaded: AttributeError"),
        (("wrong:right_eagle", "eagle", "cuda:77"), "wrong:right_eagle was not loaded: .*no device 'cuda:77'"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conformance(*arguments)


def test_our_own_executors_hold(capsys: pytest.CaptureFixture[str]) -> None:
    status = conformance(None, None)
    out = capsys.readouterr().out
    assert status == 0, out
    total = sum(len(clauses(contract)) for contract in CONTRACTS)
    assert f"reference: {total} clauses, {total} hold, 0 fail, 0 skipped" in out
    for contract in CONTRACTS:
        assert any(line.startswith(f"{contract}, cpu") for line in out.splitlines())
