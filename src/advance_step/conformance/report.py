"""The results as a table, as markdown and as JSON, and the command that makes them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from dataclasses import asdict

from advance_step.conformance.case import CONTRACTS
from advance_step.conformance.isolated import TIMEOUT, NotLoadedError, check_isolated
from advance_step.conformance.run import FAILS, HOLDS, SKIPPED, Result, clauses, refuse_unknown, skipped

FORMATS = ("table", "json", "markdown")
EXECUTORS = ("native", "triton", "reference")


def conformance(
    target: str | None,
    contract: str | None,
    device: str = "cpu",
    skip: Collection[str] = (),
    form: str = "table",
    timeout: float = TIMEOUT,
) -> int:
    """Prints what came of every clause and returns the exit status: 1 if one failed.

    Without a target: our own operators, once for each executor on this machine.
    Raises ValueError for what cannot be run: an unknown contract, clause or format, a target that does not load.
    """
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if target is not None and contract is None:
        raise ValueError(f"contract: expected one of {', '.join(CONTRACTS)} with target {target}, got none")
    if timeout <= 0:
        raise ValueError(f"timeout: expected more than 0 seconds, got {timeout:g}")
    contracts = list(CONTRACTS) if contract is None else [contract]
    refuse_unknown(skip, contracts)
    columns: dict[str, list[Result]] = {}
    missing: dict[str, str] = {}
    for name, environment in _columns(target, device).items():
        pending = [(c, clause) for c in contracts for clause in clauses(c) if clause not in skip]
        try:
            found = {(r.contract, r.clause): r for r in check_isolated(target, pending, device, environment, timeout)}
        except NotLoadedError as error:
            missing[name] = str(error)
            continue
        columns[name] = [
            found[c, clause] if clause not in skip else skipped(c, clause) for c in contracts for clause in clauses(c)
        ]
    if not columns:
        raise ValueError("; ".join(f"{name} was not loaded: {reason}" for name, reason in missing.items()))
    print({"table": table, "json": as_json, "markdown": markdown}[form](columns, missing, device))
    return int(any(result.outcome == FAILS for results in columns.values() for result in results))


def _columns(target: str | None, device: str) -> dict[str, dict[str, str]]:
    """The columns of the table and each one's environment."""
    if target is not None:
        return {target: {}}
    executors = {name: {"ADVANCE_STEP_BACKEND": name} for name in EXECUTORS}
    if device == "cpu" and importlib.util.find_spec("triton"):
        executors["triton"]["TRITON_INTERPRET"] = "1"
    return executors


def table(columns: dict[str, list[Result]], missing: dict[str, str], device: str) -> str:
    """Plain text, a line a clause: with one target what was found, with several executors a column each."""
    width = max(len(result.clause) for results in columns.values() for result in results)
    lines, contract = [], ""
    for rows in zip(*columns.values(), strict=True):
        if rows[0].contract != contract:
            contract = rows[0].contract
            heading = "".join(f"{name:<11}" for name in columns)
            lines += ["", f"{f'{contract}, {device}':<{width}}  {heading}".rstrip()]
        cells = "".join(f"{result.outcome:<11}" for result in rows)
        lines.append(f"{rows[0].clause:<{width}}  {cells}{_finding(rows[0]) if len(columns) == 1 else ''}".rstrip())
    findings = ["", *_findings(columns)] if len(columns) > 1 else []
    return "\n".join([*lines[1:], *findings, "", *_summary(columns, missing)])


def markdown(columns: dict[str, list[Result]], missing: dict[str, str], device: str) -> str:
    """A table for an issue or a page of documentation, the sentences of the contract beside their clauses."""
    lines, contract = [], ""
    one = len(columns) == 1
    for rows in zip(*columns.values(), strict=True):
        if rows[0].contract != contract:
            contract = rows[0].contract
            heading = [f"{contract}, {device}", *columns, *(["found"] if one else []), "the contract says"]
            lines += ["", f"| {' | '.join(heading)} |", "|" + " --- |" * len(heading)]
        cells = [rows[0].clause, *(r.outcome for r in rows), *([_finding(rows[0])] if one else []), rows[0].sentence]
        lines.append(f"| {' | '.join(cells)} |")
    findings = [] if one else ["", *(f"- {line}" for line in _findings(columns))]
    return "\n".join([*lines[1:], *findings, "", *_summary(columns, missing)])


def as_json(columns: dict[str, list[Result]], missing: dict[str, str], device: str) -> str:
    found = {name: [asdict(result) for result in results] for name, results in columns.items()}
    return json.dumps({"device": device, "results": found, "not_loaded": missing}, indent=2)


def _finding(result: Result) -> str:
    return f"{result.deviation}: {result.detail}" if result.deviation else result.detail


def _findings(columns: dict[str, list[Result]]) -> list[str]:
    return [
        f"{name}, {result.contract}, {result.clause}: {_finding(result)}"
        for name, results in columns.items()
        for result in results
        if result.outcome == FAILS
    ]


def _summary(columns: dict[str, list[Result]], missing: dict[str, str]) -> list[str]:
    lines = []
    for name, results in columns.items():
        counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in (HOLDS, FAILS, SKIPPED)}
        hold, fail, skip = counts.values()
        lines.append(f"{name}: {len(results)} clauses, {hold} hold, {fail} fail, {skip} skipped")
        named: dict[str, list[str]] = {}
        for result in results:
            for deviation in (result.deviation or "").split(" + ") if result.deviation else []:
                named.setdefault(deviation.partition(" (")[0], []).append(result.clause)
        lines += [f"  known deviation: {deviation} ({', '.join(where)})" for deviation, where in named.items()]
    return lines + [f"{name}: not on this machine: {reason}" for name, reason in missing.items()]
