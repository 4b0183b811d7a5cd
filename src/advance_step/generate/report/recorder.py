"""What a report is made of: noted after each pass and each sync, in memory that does not grow with the run."""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from advance_step.decode.request import Figures, Occupancy, Request
from advance_step.generate.report.timeline import Sample, Timeline

# Requests whose latencies and lengths are kept.
MAX_SAMPLED = 10_000

# Stays that are kept, for each place of the batch and in all: more could not be told apart on a screen.
STAYS_PER_PLACE, MAX_STAYS = 100, 1_500


@dataclass
class Stay:
    """A request in one place of the batch, from its admission until it is finished or put back; in seconds of the run.

    decoding_from: when its first token, or after being put back its next one, was there.
    """

    place: int
    begin: float
    decoding_from: float | None = None
    end: float | None = None
    put_back: bool = False


class Finished(NamedTuple):
    """Of a finished request: seconds from its admission to its first token and to its last, and lengths in tokens."""

    first_token: float
    total: float
    prompt_tokens: int
    new_tokens: int


@dataclass
class _Life:
    """A request from its first admission on; `stay` is None while it is put back."""

    request: Request  # held, so that its id() is nobody else's
    begin: float
    first_token: float | None = None
    stay: Stay | None = None


class Recorder:
    """The figures of a run over time.

    batch_size, num_pages: what there is of rows and pages.
    clock: seconds; time begins when the recorder is made.

    seconds: of the run, at the last look.
    timeline: by the names in `look`, what was done in each bin; "seconds" is how much of it the run covers, and
        "row_seconds" and "page_seconds" are rows and pages in use times seconds.
    busy: for each place of the batch, by its number, seconds in which it had a request.
    stays: the first ones, in order of admission; `stays_until` is where the first that is not kept begins, or None.
    finished: latencies and lengths. finish_reasons: how many ended by each.
    peak_rows, peak_pages: the most in use at a look. preemptions: how often a request was put back.
    figures: the decoder's at the last look.
    """

    def __init__(self, batch_size: int, num_pages: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.batch_size = batch_size
        self.num_pages = num_pages
        self.seconds = 0.0
        self.timeline = Timeline()
        self.busy = Timeline()
        self.stays: list[Stay] = []
        self.stays_until: float | None = None
        self.num_stays = 0
        self.finished: Sample[Finished] = Sample(MAX_SAMPLED)
        self.finish_reasons: Counter[str] = Counter()
        self.peak_rows = 0
        self.peak_pages = 0
        self.preemptions = 0
        self.figures = Figures()
        self._clock = clock
        self._started = clock()
        self._lives: dict[int, _Life] = {}  # by id() of the requests
        self._free = list(range(batch_size))  # places; a heap

    def look(self, figures: Figures, occupancy: Occupancy, finished: Sequence[Request]) -> None:
        """Note what was done since the last look; to be called after each yield of `Decoder.run`.

        figures, occupancy: the decoder's. finished: the requests that it yielded.
        """
        before, now = self.seconds, self._clock() - self._started
        self.seconds = now
        decoding = {id(request): request for request in (*occupancy.live, *finished)}
        present = decoding | {id(request): request for request in occupancy.prefilling}
        put_back = [life for key, life in self._lives.items() if life.stay and key not in present]
        for life in put_back:
            self._leave(life, before, put_back=True)  # it made room before this step began
        for key, request in present.items():
            life = self._lives.get(key) or self._lives.setdefault(key, _Life(request, before))
            if life.stay is None:
                life.stay = self._enter(before)
            if key in decoding and life.stay.decoding_from is None:
                life.stay.decoding_from = now
                life.first_token = now if life.first_token is None else life.first_token
        for request in finished:
            self._finish(self._lives.pop(id(request)), now)
        self._note(figures, before, now, len(present), occupancy.pages, len(put_back))

    def _note(self, figures: Figures, before: float, now: float, rows: int, pages: int, preemptions: int) -> None:
        last, seconds = self.figures, now - before
        amounts: dict[Hashable, float] = {
            "seconds": seconds,
            "tokens": figures.tokens - last.tokens,
            "row_seconds": rows * seconds,
            "page_seconds": pages * seconds,
            "draft_tokens": figures.draft_tokens - last.draft_tokens,
            "accepted_tokens": figures.accepted_tokens - last.accepted_tokens,
        }
        self.timeline.add(before, now, amounts)
        self.timeline.add(before, before, {"preemptions": preemptions})
        self.peak_rows = max(self.peak_rows, rows)
        self.peak_pages = max(self.peak_pages, pages)
        self.preemptions += preemptions
        self.figures = replace(figures)

    def _enter(self, now: float) -> Stay:
        """A place for a request: the first that is free."""
        stay = Stay(heapq.heappop(self._free), now)
        self.num_stays += 1
        if len(self.stays) < min(MAX_STAYS, STAYS_PER_PLACE * self.batch_size):
            self.stays.append(stay)
        elif self.stays_until is None:
            self.stays_until = now
        return stay

    def _leave(self, life: _Life, now: float, put_back: bool) -> None:
        stay = life.stay
        assert stay is not None
        life.stay, stay.end, stay.put_back = None, now, put_back
        heapq.heappush(self._free, stay.place)
        self.busy.add(stay.begin, now, {stay.place: now - stay.begin})

    def _finish(self, life: _Life, now: float) -> None:
        request = life.request
        assert life.first_token is not None and request.finish_reason is not None
        self._leave(life, now, put_back=False)
        times = life.first_token - life.begin, now - life.begin
        self.finished.add(Finished(*times, len(request.prompt_ids), len(request.tokens)))
        self.finish_reasons[request.finish_reason] += 1

    def close(self) -> None:
        """Count as busy until the last look the places whose requests did not come to their end."""
        for life in self._lives.values():
            if life.stay:
                self.busy.add(life.stay.begin, self.seconds, {life.stay.place: self.seconds - life.stay.begin})
        self._lives.clear()
