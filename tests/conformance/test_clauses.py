"""The clauses hold for a right implementation, and each wrong one fails the right clauses under the right name."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import wrong
from right import implementation

from advance_step.conformance import CONTRACTS, check, clauses, deviations, judge

STEPS = ("npu", "vllm", "flashinfer")


def failures(target, contract: str) -> dict[str, str | None]:
    """The clauses that fail, each with the deviation that it is named by."""
    return {result.clause: result.deviation for result in check(target, contract) if result.outcome == "FAILS"}


def details(target, contract: str) -> dict[str, str]:
    return {result.clause: result.detail for result in check(target, contract) if result.outcome == "FAILS"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_right_implementation_passes(contract: str, seed: int) -> None:
    results = list(check(implementation(contract), contract, seed=seed))
    assert [result.clause for result in results] == list(clauses(contract))
    assert [result for result in results if result.outcome != "holds"] == []


@pytest.mark.parametrize("contract", CONTRACTS)
def test_inputs_are_drawn_from_the_seed(contract: str) -> None:
    for clause in clauses(contract).values():
        assert clause.cases(Random("a")) == clause.cases(Random("a"))
    drawn = clauses(contract)["own-row-of-the-table"]
    assert drawn.cases(Random("a")) != drawn.cases(Random("b"))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_only_row_0_has_the_right_page(contract: str) -> None:
    found = failures(implementation(contract, wrong.row_0_slot), contract)
    assert found["own-row-of-the-table"] == found["page-boundary"] == found["more-than-48-rows"] == deviations.ROW_0
    assert set(found.values()) == {deviations.ROW_0}


@pytest.mark.parametrize(
    ("contract", "clause_names"),
    [
        ("npu", {"narrow-table", "spec-narrow-table"}),
        ("vllm", {"narrow-table"}),
        ("flashinfer", {"narrow-table"}),
        ("eagle", {"past-the-table"}),
        ("slot-mapping", {"narrow-table", "context-parallel-narrow-table"}),
        # A step that runs on where it should stop shows wherever a sequence stands at the end of its table.
        (
            "until-stop",
            {
                *("no-page", "groups-one-without-a-page", "first-that-holds", "pad-slot", "more-than-64x132-rows"),
                "int32-length-at-its-end",
            },
        ),
    ],
)
def test_last_column_instead_of_no_page(contract: str, clause_names: set[str]) -> None:
    found = failures(implementation(contract, wrong.last_column_slot), contract)
    assert found == dict.fromkeys(clause_names, deviations.LAST_COLUMN)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_32_bit_slot(contract: str) -> None:
    found = failures(implementation(contract, wrong.int32_slot), contract)
    expected = {"slot-past-32-bits", "block-sizes"}
    expected |= {"npu": {"spec-slot-past-32-bits"}, "until-stop": {"int32-length-at-its-end"}}.get(contract, set())
    assert found == dict.fromkeys(expected, deviations.SLOT_32)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_negative_page(contract: str) -> None:
    found = failures(implementation(contract, wrong.negative_page_slot), contract)
    expected = {"negative-page"} | {"npu": {"spec-negative-page"}, "slot-mapping": {"pad-slot"}}.get(contract, set())
    assert found == dict.fromkeys(expected, deviations.NEGATIVE_PAGE)


@pytest.mark.parametrize("n", [40, 8448])
@pytest.mark.parametrize("contract", [*STEPS, "eagle", "slot-mapping"])
def test_rows_past_n_untouched(contract: str, n: int) -> None:
    found = failures(wrong.rows_past(contract, n), contract)
    expected = {"more-than-64x132-rows"}
    if n < 48:
        expected |= {"more-than-48-rows"}
        expected |= {"npu": {"spec-more-than-48-rows"}, "flashinfer": {"metadata-of-many-rows"}}.get(contract, set())
    assert found == dict.fromkeys(expected, f"{deviations.ROWS_PAST_N} (N={n})")


@pytest.mark.parametrize("contract", [*STEPS, "eagle", "slot-mapping"])
def test_every_nth_pad_row_cleared(contract: str) -> None:
    found = failures(wrong.nth_pad_row(contract, 40), contract)
    assert found["several-pad-rows"] == f"{deviations.NTH_PAD_ROW} (N=40)"
    assert all(name is not None and name.startswith(deviations.NTH_PAD_ROW) for name in found.values())
    assert set(found) <= {"several-pad-rows", "padding-lengths-not-judged", "no-live-rows", "padding-indptr", "no-rows"}


def test_the_published_ascend_kernel_has_three_deviations() -> None:
    found = failures(wrong.published_npu(cores=40), "npu")
    assert found["own-row-of-the-table"] == deviations.ROW_0
    assert found["more-than-48-rows"] == f"{deviations.ROW_0} + {deviations.ROWS_PAST_N} (N=40)"
    assert found["several-pad-rows"] == f"{deviations.NTH_PAD_ROW} (N=40)"
    assert not any(clause.startswith("spec-") for clause in found)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_target_that_refuses_nothing(contract: str) -> None:
    found = failures(implementation(contract, checks=False), contract)
    assert {"refuses-shared-memory", "refuses-dtypes", "errors-name-the-argument"} <= set(found)
    data = {name for name, deviation in found.items() if deviation == deviations.NO_ERROR}
    expected = {
        "npu": {
            "narrow-table",
            "negative-length",
            "spec-all-rejected",
            "spec-narrow-table",
            "spec-position-past-64-bits",
        },
        "vllm": {"narrow-table", "negative-length", "int32-length-at-its-end"},
        "flashinfer": {"narrow-table", "negative-length", "int32-length-at-its-end", "indices-too-small"},
        "slot-mapping": {
            *("narrow-table", "context-parallel-narrow-table", "negative-position", "broken-query-start-loc"),
        },
    }
    assert data == expected.get(contract, set())
    assert all(name in data or name.startswith(("refuses", "errors", "strict", "spec-refuses")) for name in found)


def test_data_out_of_place_on_an_accelerator_gets_the_pad_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator is needed to hold a target to an accelerator's rule."""
    monkeypatch.setattr(judge, "checks_data", lambda device: False)
    raises_there = {"refuses-shapes", "refuses-dtypes", "refuses-scalars", "refuses-shared-memory"}
    for contract in CONTRACTS:
        found = failures(implementation(contract, checks=False), contract)
        assert all(name.startswith(("refuses", "errors", "strict", "spec-refuses")) for name in found), found
        assert raises_there & set(found)
    found = failures(implementation("vllm", wrong.last_column_slot, checks=False), "vllm")
    assert found["narrow-table"] == deviations.LAST_COLUMN
    assert "negative-length" not in found
    assert "narrow-table" in failures(implementation("vllm"), "vllm"), "raises, as only the CPU must"


@pytest.mark.parametrize("mistake", wrong.SLOT_MISTAKES)
def test_mistakes_in_a_slot_mapping_are_found(mistake: str) -> None:
    mistaken, clause_names = wrong.SLOT_MISTAKES[mistake]
    found = failures(wrong.mistaken_slots(mistaken), "slot-mapping")
    assert clause_names <= set(found)
    assert not any(name.startswith(("refuses", "errors")) for name in found)


def test_a_write_past_the_end_is_seen_and_not_explained() -> None:
    found = list(check(wrong.writes_past_the_end("vllm"), "vllm"))
    hit = [result for result in found if "wrote outside slot_mapping: 1 cells" in result.detail]
    assert {"one-row", "no-rows", "vector-strides"} <= {result.clause for result in hit}
    assert {result.deviation for result in hit} == {None}


def test_a_written_table_is_seen() -> None:
    found = details(wrong.writes_a_table("npu"), "npu")
    assert found["one-row"].startswith("block_tables[0, 0] is ")


def test_an_error_after_a_write_is_seen() -> None:
    found = details(wrong.raises_too_late("vllm"), "vllm")
    assert found["narrow-table"].startswith("raised, but had written: input_tokens[0] is 0")
    assert found["refuses-shapes"].startswith("raised, but had written: input_tokens[0] is 0")


def test_a_returned_value_is_seen() -> None:
    assert details(wrong.returns_a_tensor("vllm"), "vllm")["one-row"] == "returned Tensor, expected None"


def test_an_error_without_a_name_is_seen() -> None:
    found = details(wrong.says_nothing("vllm"), "vllm")
    assert found["errors-name-the-argument"].startswith("the error does not name input_tokens: ValueError: invalid")
    assert found["narrow-table"].startswith("the error does not name seq_lens and row 37")
    assert "refuses-shapes" not in found


def test_an_exception_of_the_target_fails_the_clause() -> None:
    def broken(*args: object, **keyword: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    found = details(broken, "eagle")
    assert found["advances"] == "raised RuntimeError: no kernel image"
    assert "refuses-shapes" not in found


def test_skip() -> None:
    results = {r.clause: r for r in check(wrong.writes_a_table("vllm"), "vllm", skip=["one-row"])}
    assert (results["one-row"].outcome, results["one-row"].detail) == ("skipped", "by request")
    with pytest.raises(ValueError, match=r"skip: expected clauses of vllm: .*; got one-raw"):
        list(check(implementation("vllm"), "vllm", skip=["one-raw"]))
    with pytest.raises(ValueError, match="contract: expected one of npu, vllm"):
        list(check(implementation("vllm"), "vlm"))


def test_the_documentation_lists_every_clause() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    listed = page[page.index("## The clauses") : page.index("## Known deviations")]
    assert set(re.findall(r"^\| `([^`]+)`", listed, re.MULTILINE)) == {n for c in CONTRACTS for n in clauses(c)}


def test_sentences_stand_by_themselves() -> None:
    """No sentence refers to a numbered section: the document that has it is not at hand where the table is read."""
    sentences = {clause.sentence for contract in CONTRACTS for clause in clauses(contract).values()}
    assert [sentence for sentence in sentences if re.search(r"\b(as in|section) \d", sentence)] == []
