"""The page of a report, from what was recorded and what is known of the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from advance_step.generate.report.charts import Charts, unit_of
from advance_step.generate.report.recorder import Finished, Recorder

PERCENTILES = (50, 90, 99)


@dataclass
class Facts:
    """What is known of a run beside its figures.

    ended, why: how it came to its end, and, unless it finished, by what.
    finished, failed: lines of this run; earlier: lines that earlier runs of the job have done.
    total: lines of the input, where that is known.
    settings, versions: names and values, as they are shown.
    """

    model: str
    input: str
    begun: str
    ended: Literal["finished", "interrupted", "failed"]
    why: str
    finished: int
    failed: int
    earlier: int
    total: int | None
    settings: dict[str, Any]
    versions: dict[str, Any]


def render(facts: Facts, recorder: Recorder | None) -> str:
    """The page as HTML. recorder: of the run, closed; None where it did not come to decoding."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    recorded = recorder if recorder and recorder.seconds else None
    return template.render(
        facts=facts,
        notes=_notes(facts, recorded),
        tiles=_tiles(facts, recorded),
        sections=_sections(recorded) if recorded else [],
        table=_table(recorded.finished.items) if recorded else [],
    )


def _notes(facts: Facts, recorder: Recorder | None) -> list[str]:
    """What a reader must know to read the page right."""
    notes = []
    if facts.ended != "finished":
        notes.append(f"This run did not come to its end: {facts.why}. The page shows what was done until then.")
    if recorder is None:
        notes.append("Nothing was decoded.")
    if facts.earlier:
        lines = _count(facts.earlier, "line")
        notes.append(f"This run continued an output with --resume: the {lines} of earlier runs are not on this page.")
    if facts.failed:
        notes.append(f"{_count(facts.failed, 'line')} failed; the output says why.")
    if recorder and recorder.finished.count > len(recorder.finished.items):
        kept, count = len(recorder.finished.items), _count(recorder.finished.count, "finished request")
        notes.append(f"Latencies and lengths are those of {kept:,} requests, drawn at random from {count}.")
    return notes


def _tiles(facts: Facts, recorder: Recorder | None) -> list[dict[str, str]]:
    of = f"of {facts.total:,}" if facts.total and not facts.earlier else ""
    tiles = [_tile("Prompts finished", f"{facts.finished:,}", of)]
    if recorder is None:
        return tiles
    figures, finished = recorder.figures, recorder.finished.items
    tiles += [
        _tile("Tokens generated", f"{figures.tokens:,}"),
        _tile("Tokens per second", _rounded(figures.tokens / recorder.seconds)),
        _tile("Duration", duration(recorder.seconds)),
    ]
    if finished:
        tiles.append(_tile("First token after", duration(_percentile([f.first_token for f in finished], 50)), "median"))
        tiles.append(_tile("Request done after", duration(_percentile([f.total for f in finished], 50)), "median"))
    tiles += [
        _tile("Most rows in use", f"{recorder.peak_rows:,}", f"of {recorder.batch_size:,}"),
        _tile("Most pages in use", f"{recorder.peak_pages:,}", f"of {recorder.num_pages:,}"),
        _tile("Preemptions", f"{recorder.preemptions:,}"),
    ]
    if figures.draft_tokens:
        share = f"{figures.accepted_tokens / figures.draft_tokens:.0%}"
        tiles.append(_tile("Drafts accepted", share, f"of {figures.draft_tokens:,}"))
    return tiles


def _sections(recorder: Recorder) -> list[dict[str, Any]]:
    charts = Charts(recorder)
    rows, pages = recorder.batch_size, recorder.num_pages
    in_rows, in_pages = charts.level("row_seconds", "Rows", rows), charts.level("page_seconds", "Pages", pages)
    over_time = [
        _chart("Rows in use", in_rows, legend=[("dashed", f"Limit: {_count(rows, 'row')}")]),
        _chart("Pages in use", in_pages, legend=[("dashed", f"Limit: {_count(pages, 'page')}")]),
    ]
    if recorder.preemptions:
        text = "Requests that gave up their pages to older ones, and were computed again later."
        over_time.append(_chart("Preemptions", charts.preemptions(), text))
    if recorder.figures.draft_tokens:
        text = "Of the draft tokens that were proposed, those that were right."
        over_time.append(_chart("Draft acceptance", charts.acceptance(), text))
    wide = len(over_time) % 2 == 0  # so that no place beside a chart stays empty
    over_time.insert(0, _chart("Generated tokens", charts.rate("tokens", "Tokens per second", wide), whole=wide))
    bins = f"Means over {duration(recorder.timeline.width)} each."
    sections = [
        {"title": "Over time", "text": bins, "charts": over_time},
        {"title": "Requests in the batch", "text": "", "charts": _places(recorder, charts)},
    ]
    if recorder.finished.items:
        sections.append({"title": "Latencies and lengths", "text": "", "charts": _distributions(recorder, charts)})
    return sections


def _places(recorder: Recorder, charts: Charts) -> list[dict[str, Any]]:
    """Each request as a bar; of a long run the beginning so, and the whole by how busy each place was."""
    legend = [("second", "Prefill"), ("first", "Decoding")]
    if any(stay.put_back for stay in recorder.stays):
        legend.append(("stroke", "Put back: it gave up its pages, and came again later"))
    text = "Every request is a bar in its place of the batch, from its admission to its end."
    if recorder.stays_until is None:
        return [_chart("Rows", charts.places(), text, legend, whole=True)]
    until, whole = duration(recorder.stays_until), duration(recorder.seconds)
    some = f"{len(recorder.stays):,} of {_count(recorder.num_stays, 'admission')}"
    part = f"{text} Only the beginning, {until} of {whole}, is drawn so: {some}."
    busy = "For the whole run: the stronger the colour, the more of the time the place had a request."
    return [
        _chart("Rows, at the beginning", charts.places(), part, legend, whole=True),
        _chart("Rows, the whole run", charts.busy(), busy, whole=True),
    ]


def _distributions(recorder: Recorder, charts: Charts) -> list[dict[str, Any]]:
    finished, reasons = recorder.finished.items, recorder.finish_reasons
    ends = f"{reasons['stop']:,} ended by a stop, {reasons['length']:,} by their length."
    first_token, total = [f.first_token for f in finished], [f.total for f in finished]
    prompts, new = [f.prompt_tokens for f in finished], [f.new_tokens for f in finished]
    return [
        _chart("Time to first token", charts.histogram(first_token, "Time", True), "From its admission to the batch."),
        _chart("Total latency", charts.histogram(total, "Time", True), "From its admission to its last token."),
        _chart("Prompt length", charts.histogram(prompts, "Tokens", False), "With the chat template's tokens."),
        _chart("Generated length", charts.histogram(new, "Tokens", False), ends),
    ]


def _table(finished: Sequence[Finished]) -> list[list[str]]:
    """Percentiles of what the distributions show."""
    if not finished:
        return []
    later = [(f.total - f.first_token) / (f.new_tokens - 1) for f in finished if f.new_tokens > 1]
    times = {
        "Time to first token": [f.first_token for f in finished],
        "Total latency": [f.total for f in finished],
        "Time per token after the first": later,
    }
    lengths = {
        "Prompt tokens": [f.prompt_tokens for f in finished],
        "Generated tokens": [f.new_tokens for f in finished],
    }
    rows = [["", "Mean", "Median", *(f"{p} %" for p in PERCENTILES[1:]), "Most"]]
    rows += [[name, *map(duration, _spread(values))] for name, values in times.items() if values]
    return rows + [[name, *map(_rounded, _spread(values))] for name, values in lengths.items()]


def duration(seconds: float) -> str:
    """Seconds in a unit that fits, with three digits; minutes and hours with what is left of them."""
    size, unit = unit_of(seconds)
    if unit == "min":
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if unit == "h":
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{_rounded(seconds / size)} {unit}"


def _spread(values: Sequence[float]) -> list[float]:
    return [sum(values) / len(values), *(_percentile(values, p) for p in PERCENTILES), max(values)]


def _percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of them are not above."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _rounded(value: float) -> str:
    """With three digits, or all those before the point."""
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _tile(name: str, value: str, of: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "of": of}


def _chart(
    title: str, svg: str, text: str = "", legend: Sequence[tuple[str, str]] = (), whole: bool = False
) -> dict[str, Any]:
    """whole: as wide as the page."""
    return {"title": title, "svg": svg, "text": text, "legend": legend, "whole": whole}
