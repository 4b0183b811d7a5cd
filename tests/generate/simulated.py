"""A run that takes no time: a decoder's figures as it would give them, on a clock of its own."""

from __future__ import annotations

import random

from advance_step.decode.request import Figures, Occupancy, Request
from advance_step.generate.report.recorder import Recorder


class Clock:
    """Seconds that go by when they are told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def simulate(
    num_requests: int, batch_size: int = 32, num_pages: int = 2048, drafts: bool = True, stop_after: int | None = None
) -> Recorder:
    """A recorder after a run of so many requests: prefill passes, steps, preemptions, drafts.

    stop_after: looks after which the run is broken off.
    """
    draw, clock = random.Random(7), Clock()
    recorder, figures = Recorder(batch_size, num_pages, clock), Figures()
    lengths = [min(400, int(draw.lognormvariate(3.6, 0.8)) + 1) for _ in range(num_requests)]
    waiting = [Request(number, [5] * (20 + draw.randrange(200))) for number in range(num_requests)][::-1]
    live: list[Request] = []
    looks = 0
    while (live or waiting) and looks != stop_after:
        looks += 1
        finished: list[Request] = []
        if waiting and len(live) < batch_size:
            fresh = [waiting.pop() for _ in range(min(batch_size - len(live), 4, len(waiting)))]
            clock.seconds += 0.02 + 0.0001 * sum(len(request.token_ids) for request in fresh)
            figures.prefill_tokens += sum(len(request.token_ids) for request in fresh)
            live += fresh
            stepped = fresh
        else:
            if draw.random() < 0.002 and len(live) > 4:
                waiting.append(live.pop())
            clock.seconds += 0.02 + 0.0002 * len(live)
            figures.steps += 1
            stepped = live
        for request in stepped:
            new = 1
            if drafts and stepped is live:
                figures.draft_tokens += 3
                new += draw.randrange(3)
                figures.accepted_tokens += new - 1
            request.tokens += [6] * new
            figures.tokens += new
            if len(request.tokens) >= lengths[int(request.id)]:
                request.finish_reason = draw.choice(["stop", "length"])
                finished.append(request)
        live = [request for request in live if not request.finish_reason]
        pages = sum(-(-request.seq_len // 16) for request in live)
        recorder.look(figures, Occupancy(list(live), [], pages), finished)
    recorder.close()
    return recorder
