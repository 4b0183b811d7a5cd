"""One run of the job: lines become requests as rows get free, and requests results as they finish."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import disable_progress_bar

from advance_step.decode.loop import Decoder
from advance_step.decode.request import Request
from advance_step.generate import screen
from advance_step.generate.engine import make_decoder
from advance_step.generate.in_order import InOrder
from advance_step.generate.inputs import Input
from advance_step.generate.model import load_model
from advance_step.generate.outputs import Output
from advance_step.generate.read_ahead import read_ahead
from advance_step.generate.records import BadLine, LineError, Prompt, digest_of_id
from advance_step.generate.requests import RequestMaker, remarks, to_text
from advance_step.generate.results import error_result, of_what, result
from advance_step.generate.settings import DTYPES, Settings
from advance_step.generate.verify import verify

if TYPE_CHECKING:
    from advance_step.generate.report.report import Report


@dataclass
class Pending:
    """A prompt that is being decoded: its samples, and how many of them are not finished."""

    prompt: Prompt
    requests: list[Request]
    unfinished: int


class Run:
    """What is on its way from the input to the output, or, without one, to the screen.

    finished: prompts that are, with those of an earlier run.
    total: lines of the input, where that is known; while a file is read, its blank lines among them.
    """

    def __init__(self, source: Input, out: Output | None, settings: Settings, report: "Report | None" = None) -> None:
        self.source = source
        self.total = source.total
        self.out = out
        self.settings = settings
        self.report = report
        self.finished = len(out.done) if out else 0
        self.num_failed = len(out.failed_lines) if out else 0
        self.first_failed: BadLine | None = None
        self.pending: dict[int | str, Pending] = {}  # by the id of their requests, the line
        self.num_handed_out = 0  # lines, to Ray's workers
        self.records: Iterator[Prompt | BadLine | None] = source.records
        if source.is_stream:
            self.records = read_ahead(source.records, may_wait=lambda: not self.pending and not self.num_handed_out)
        self.order = InOrder(settings.ordered)
        # Of the first prompts, as many as are to be verified; with the request, where this run decodes it.
        self.to_verify: list[tuple[Prompt, Request | None]] = []

    def run(self) -> int:
        """Decode what is not decoded yet, and verify; returns the exit code."""
        todo = self._unfinished_records()
        first = next(todo, None)
        verified = True
        if first is None and not self.to_verify:
            name = self.out.name if self.out else self.source.name
            screen.say(f"{name} has every prompt already")
        else:
            if first is not None and self.settings.ray:
                self._decode_on_ray(chain([first], todo))
            if self.settings.verify or not self.settings.ray:
                disable_progress_bar()  # transformers' own
                model, tokenizer = load_model(
                    self.settings.model, DTYPES[self.settings.dtype], screen.say, self.settings.device
                )
                if first is not None and not self.settings.ray:
                    self._decode(model, tokenizer, chain([first], todo))
                verified = not self.settings.verify or verify(model, tokenizer, self.to_verify, self.settings)
        if self.num_failed:
            screen.say(screen.failures(self.num_failed, self.first_failed, self.out))
        return 0 if verified and not self.num_failed else 1

    def _unfinished_records(self) -> Iterator[Prompt | BadLine | None]:
        """The lines of the input that the output does not have; None where the next line is not there yet."""
        for record in self.records:
            if record is None:
                yield None
                continue
            if self.out and record.line in self.out.failed_lines:
                continue
            if self.out and isinstance(record, Prompt) and digest_of_id(record.id) in self.out.done:
                self.out.done.remove(digest_of_id(record.id))  # an id comes once
                self._note_for_verify(record, None)
                continue
            yield record

    def _note_for_verify(self, prompt: Prompt, request: Request | None) -> None:
        if len(self.to_verify) < self.settings.verify:
            self.to_verify.append((prompt, request))

    def _decode(self, model: Any, tokenizer: Any, records: Iterator[Prompt | BadLine | None]) -> None:
        """Decode the records and hand out each result: a text as it grows if it is the only one and for the screen."""
        maker = RequestMaker(model, tokenizer, self.settings)
        decoder = make_decoder(model, tokenizer, self.settings, self.source.total, screen.say)
        for line in opening(model, decoder, self.settings):
            screen.say(line)
        if self.report:
            self.report.begin(decoder)
        begun, before, lines_before = time.perf_counter(), self.finished, self.finished + self.num_failed
        alone = self.out is None and self.source.total == 1
        stream = screen.text_stream(tokenizer, screen.write)
        with screen.progress_bar() as bar:
            task = bar.add_task("", total=self.total, completed=lines_before, visible=not alone)
            for done in decoder.run(self.requests(records, decoder, maker)):
                if self.report:
                    self.report.look(decoder, done)
                if alone:
                    for pending in self.pending.values():
                        stream(pending.requests[0])
                for request in done:
                    self.finish(request, model, tokenizer, alone)
                lines = self.finished + self.num_failed
                seconds = time.perf_counter() - begun
                line = screen.progress_line(decoder.figures, decoder.num_rows, lines, self.total, lines_before, seconds)
                bar.update(task, total=self.total, completed=lines, description=line)
        screen.say(screen.summary(decoder.figures, self.finished - before))

    def _decode_on_ray(self, records: Iterator[Prompt | BadLine | None]) -> None:
        """Have the records decoded in blocks by Ray's workers, and write what comes back."""
        from advance_step.generate.on_ray import Blocks, Cluster

        assert self.out
        before, begun, tokens = self.finished, time.perf_counter(), 0
        with Cluster(self.settings) as cluster, screen.progress_bar() as bar:
            screen.say(f"on Ray: {cluster.describe()}")
            task = bar.add_task("", total=self.total, completed=self.finished + self.num_failed)
            blocks = Blocks(self._handed_out(records), cluster.lines_of_a_block(self.total))
            for block, result in cluster.decode(blocks):
                self.num_handed_out -= len(block)
                for record, entry in zip(block, result.entries, strict=True):
                    self.order.ready(record.line, partial(self.out.write, entry))
                    _, failed_line = of_what(entry)
                    if failed_line is None:
                        self.finished += 1
                    else:
                        self.num_failed += 1
                tokens += result.tokens
                self.first_failed = self.first_failed or result.first_failed
                seconds = time.perf_counter() - begun
                line = f"{tokens} tokens, {tokens / seconds:.0f} tokens/s"
                bar.update(task, completed=self.finished + self.num_failed, description=line)
        seconds = time.perf_counter() - begun
        screen.say(
            f"{self.finished - before} prompts, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s"
        )

    def _handed_out(self, records: Iterator[Prompt | BadLine | None]) -> Iterator[Prompt | BadLine | None]:
        """The records, each noted as one that is to come back."""
        for record in records:
            if record is not None:
                self.num_handed_out += 1
                self.order.expect(record.line)
            if isinstance(record, Prompt):
                self._note_for_verify(record, None)
            yield record

    def requests(
        self, records: Iterator[Prompt | BadLine | None], decoder: Decoder, maker: RequestMaker
    ) -> Iterator[Request | None]:
        """The requests of the prompts; a line that is none, or that the decoder refuses, fails."""
        for record in records:
            if record is None:
                yield None
                continue
            self.order.expect(record.line)
            if isinstance(record, BadLine):
                self._fail(record)
                continue
            try:
                requests = maker.requests(record)
                _check(decoder, requests[0])
            except LineError as error:
                self._fail(BadLine(record.line, str(error), record.id, record.endpoint is not None))
                continue
            self.pending[record.line] = Pending(record, requests, len(requests))
            self._note_for_verify(record, requests[0])
            yield from requests
        self.total = self.finished + self.num_failed + len(self.pending)

    def finish(self, request: Request, model: Any, tokenizer: Any, alone: bool = False) -> None:
        """A request is finished; with the last one of its prompt, the result is written."""
        pending = self.pending[request.id]
        pending.unfinished -= 1
        if pending.unfinished:
            return
        del self.pending[request.id]
        prompt = pending.prompt
        texts = [to_text(tokenizer, request) for request in pending.requests]
        if self.out:
            entry = result(prompt, len(request.prompt_ids), texts, model.config.name_or_path)
            write = partial(self.out.write, entry)
        else:
            write = partial(screen.write, "\n" if alone else screen.as_read(prompt, texts))
        self.order.ready(prompt.line, write)
        self.finished += 1

    def _fail(self, bad: BadLine) -> None:
        """A line is not decoded: its error record is written."""
        self.num_failed += 1
        self.first_failed = self.first_failed or bad
        write = partial(self.out.write, error_result(bad)) if self.out else partial(screen.say, str(bad))
        self.order.ready(bad.line, write)


def opening(model: Any, decoder: Decoder, settings: Settings) -> list[str]:
    """What a run says at its beginning. ValueError for a generation config with values that are out of range."""
    lines = remarks(model, settings.sampling)
    if decoder.captured:
        lines = [f"on {settings.device}: steps captured in CUDA graphs, attention by {decoder.attention}", *lines]
    return lines


def _check(decoder: Decoder, request: Request) -> None:
    """LineError for a request that the decoder refuses."""
    try:
        decoder.check(request)
    except ValueError as error:
        raise LineError(str(error).removeprefix(f"request {request.id!r}: ")) from error
