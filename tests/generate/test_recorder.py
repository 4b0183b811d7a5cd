"""What a report is made of: amounts over time, stays in the batch, bounded samples."""

from __future__ import annotations

import pickle

import pytest
from simulated import Clock, simulate

from advance_step.decode.request import Figures, Occupancy, Request
from advance_step.generate.report.recorder import MAX_SAMPLED, MAX_STAYS, Finished, Recorder, Stay
from advance_step.generate.report.timeline import FIRST_WIDTH, MAX_BINS, Sample, Timeline


def test_amounts_are_spread_over_the_seconds_in_which_they_fell():
    timeline = Timeline()
    timeline.add(0.005, 0.025, {"a": 20.0})
    timeline.add(0.025, 0.025, {"b": 3.0})
    assert timeline.sums("a") == pytest.approx([5, 10, 5])
    assert timeline.sums("b") == [0, 0, 3]


def test_bins_double_and_nothing_is_lost():
    timeline = Timeline()
    for second in range(3000):
        timeline.add(second, second + 1, {"a": 2.0})
    assert timeline.num_bins <= MAX_BINS and timeline.width == FIRST_WIDTH * 2**11
    assert sum(timeline.sums("a")) == pytest.approx(6000)
    assert timeline.sums("a")[:-1] == pytest.approx([2 * timeline.width] * (timeline.num_bins - 1))


def test_a_sample_has_all_until_it_is_full_and_then_any_alike():
    sample: Sample[int] = Sample(1000)
    for item in range(1000):
        sample.add(item)
    assert sample.items == list(range(1000))
    for item in range(1000, 50_000):
        sample.add(item)
    assert sample.count == 50_000 and len(sample.items) == len(set(sample.items)) == 1000
    assert sum(sample.items) / 1000 == pytest.approx(25_000, abs=1500)  # the same draws in every run


def test_the_life_of_a_request():
    """Two places: a and b are admitted, b is put back and comes again, a ends, c is broken off."""
    clock, figures = Clock(), Figures()
    recorder = Recorder(2, 9, clock)
    a, b, c = (Request(name, [1, 2]) for name in "abc")

    def look(seconds: float, live=(), prefilling=(), finished=(), pages: int = 2, tokens: int = 1) -> None:
        clock.seconds += seconds
        figures.tokens += tokens
        recorder.look(figures, Occupancy(list(live), list(prefilling), pages), list(finished))

    look(1, prefilling=[a, b], tokens=0)
    look(1, live=[a, b], tokens=2, pages=4)
    look(1, live=[a])  # b had to make room when this step began
    look(1, live=[a, b])
    a.tokens, a.finish_reason = [1, 2, 3], "length"
    look(1, live=[b], finished=[a])
    look(1, live=[b], prefilling=[c])
    recorder.close()
    assert recorder.stays == [
        Stay(0, 0, 2, 5),
        Stay(1, 0, 2, 2, put_back=True),
        Stay(1, 3, 4, None),
        Stay(0, 5, None, None),
    ]
    assert recorder.finished.items == [Finished(2, 5, 2, 3)]
    assert recorder.finish_reasons == {"length": 1}
    assert (recorder.preemptions, recorder.peak_rows, recorder.peak_pages) == (1, 2, 4)
    assert recorder.seconds == pytest.approx(6)
    assert sum(recorder.timeline.sums("tokens")) == pytest.approx(6)
    assert sum(recorder.timeline.sums("row_seconds")) == pytest.approx(11)
    assert sum(recorder.timeline.sums("page_seconds")) == pytest.approx(14)
    assert sum(recorder.timeline.sums("preemptions")) == 1
    assert [sum(recorder.busy.sums(place)) for place in (0, 1)] == pytest.approx([6, 5])


def test_a_request_that_is_admitted_and_finished_in_one_pass():
    clock = Clock()
    recorder = Recorder(1, 1, clock)
    for number in range(3):
        clock.seconds += 1
        request = Request(number, [1], tokens=[2], finish_reason="stop")
        recorder.look(Figures(tokens=number + 1), Occupancy([], [], 0), [request])
    assert recorder.finished.items == [Finished(1, 1, 1, 1)] * 3
    assert [(stay.place, stay.begin, stay.end) for stay in recorder.stays] == [(0, 0, 1), (0, 1, 2), (0, 2, 3)]


def test_memory_does_not_grow_with_the_run():
    def size(recorder: Recorder) -> int:
        del recorder._clock
        return len(pickle.dumps(recorder))

    once, thrice = simulate(MAX_SAMPLED + 1000, drafts=False), simulate(3 * MAX_SAMPLED, drafts=False)
    assert thrice.finished.count == 3 * MAX_SAMPLED and len(thrice.finished.items) == MAX_SAMPLED
    assert len(thrice.stays) == MAX_STAYS and thrice.stays_until >= thrice.stays[-1].begin
    assert size(thrice) < 1.05 * size(once)
