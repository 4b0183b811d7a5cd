"""Who decodes next, on which pages: admission, prefill in pieces, pages on demand, preemption. Host only."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from advance_step.decode.pages import ROOT, PagePool
from advance_step.decode.request import Occupancy, Request


@dataclass(eq=False)
class Row:
    """A request that has been admitted, and its pages."""

    request: Request
    age: int  # requests admitted before it; a row that is put back keeps it
    pages: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)  # of its first pages, those that are entered under their prefix
    seed: int | None = None  # of its random numbers, once it is known
    computed: int = 0  # of its tokens, those whose keys and values are in its pages


class Chunk(NamedTuple):
    """A piece of a row's tokens to prefill in the next pass."""

    row: Row
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """Whether the row's tokens are all computed with it."""
        return self.start + self.length == self.row.request.seq_len


class Growth(NamedTuple):
    """What `reserve` did: the live rows that were put back, in order, and then the pages that others were given."""

    preempted: list[int]  # each an index among the live rows as the one before left them
    pages: dict[int, list[int]]


class Scheduler:
    """Requests on their way through the batch: waiting, prefilling, live.

    A request is admitted when there are pages for its tokens and the next one, and a page for every row that will grow.
    From then on it is given pages as it grows. When they run out, the youngest rows are put back: they give up their
    pages, wait in front of everybody, and continue later by computing prompt and tokens so far again. The oldest row is
    never put back, so that the run comes to its end.

    requests: drawn one at a time, as rows get free.
    pool: the pages; all are free at the end.
    max_num_batched_tokens: tokens that one prefill pass has at most.
    share_prefixes: whether full pages with the same tokens, from the beginning of their sequences on, are shared.

    The live rows are `rows`, in the order of the batch on the device: whoever is removed from the middle leaves its
    place to the last one.
    """

    def __init__(
        self,
        requests: Iterable[Request | None],
        pool: PagePool,
        *,
        block_size: int,
        batch_size: int,
        max_num_batched_tokens: int,
        share_prefixes: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.batch_size = batch_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.share_prefixes = share_prefixes
        self.rows: list[Row] = []
        self.prefilling: deque[Row] = deque()
        self.waiting: deque[Row] = deque()  # the one drawn ahead, and those put back, the oldest first
        self.preemptions = 0
        self.shared_tokens = 0  # of prompts, those that need not be computed
        self.exhausted = False  # no request is left to be drawn
        self._requests: Iterator[Request | None] = iter(requests)
        self._admitted = 0

    @property
    def occupancy(self) -> Occupancy:
        """Who has been admitted, and how many pages they hold."""
        live, prefilling = ([row.request for row in rows] for rows in (self.rows, self.prefilling))
        return Occupancy(live, prefilling, self.pool.size - self.pool.available)

    def prefill(self) -> list[Chunk]:
        """The next pass: admitted rows' tokens, in order, as many as a pass may have; none if there is nothing to do.

        The chunks count as computed, and rows whose last chunk is among them as live, in their order.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        while budget and (self.prefilling or self._admit()):
            row = self.prefilling[0]
            length = min(budget, row.request.seq_len - row.computed)
            chunks.append(Chunk(row, row.computed, length))
            row.computed += length
            budget -= length
            if chunks[-1].is_last:
                self.rows.append(self.prefilling.popleft())
        return chunks

    def reserve(self, steps: int) -> Growth:
        """Give the live rows pages for what `steps` steps can need; where there are none, put the youngest back.

        Only for the next step is a row put back. One that there is no page for after that stands still, as NO_PAGE,
        until the next sync.
        """
        preempted: list[int] = []
        grown: list[tuple[Row, list[int]]] = []
        for ahead in dict.fromkeys((1, steps)):
            for row in sorted(self.rows, key=lambda row: row.age):
                missing = self._pages_for(row.request, row.request.seq_len + ahead) - len(row.pages)
                if missing > 0 and row.pages:  # without pages: put back for an older one
                    while missing > self.pool.available and ahead == 1 and row.pages:
                        youngest = max((*self.rows, *self.prefilling), key=lambda row: row.age)
                        preempted += self._put_back(youngest)
                    if row.pages and missing <= self.pool.available:
                        pages = self.pool.take(missing)
                        row.pages += pages
                        grown.append((row, pages))
        pages_of: dict[int, list[int]] = {}
        for row, pages in grown:
            if row.pages:
                pages_of.setdefault(self.rows.index(row), []).extend(pages)
        return Growth(preempted, pages_of)

    def computed(self, row: Row) -> None:
        """Note that a live row's keys and values are there but for its last token's; its full pages can be shared."""
        row.computed = row.request.seq_len - 1
        self._enter(row)

    def remove(self, index: int) -> Row:
        """Take a row out of the batch and give back its pages."""
        row = self.rows[index]
        self.rows[index] = self.rows[-1]
        self.rows.pop()
        self._release(row)
        return row

    def give_up(self) -> None:
        """Give back every page; what was computed stays shared."""
        while self.rows:
            self.remove(len(self.rows) - 1)
        while self.prefilling:
            self._release(self.prefilling.pop())

    def _admit(self) -> Row | None:
        """The next request, with pages for its tokens and the next one; None if nobody waits or there is no room."""
        if len(self.rows) + len(self.prefilling) == self.batch_size or not self._draw():
            return None
        row = self.waiting[0]
        tokens = row.request.token_ids
        if self.share_prefixes:  # but for the last token: what it says is what is sampled from
            row.pages, row.entries = self.pool.share(tokens[:-1], self.block_size)
        missing = self._pages_for(row.request, len(tokens) + 1) - len(row.pages)
        others = (*self.rows, *self.prefilling)
        spare = sum(len(other.pages) < other.request.pages_needed(self.block_size) for other in others)
        if missing + spare > self.pool.available:
            self._release(row)
            return None
        self.waiting.popleft()
        row.pages += self.pool.take(missing)
        row.computed = len(row.entries) * self.block_size
        self.shared_tokens += row.computed
        # Before they are computed: who shares them comes after this row, and so reads them after they are written.
        self._enter(row, len(tokens))
        self.prefilling.append(row)
        return row

    def _draw(self) -> bool:
        """Whether somebody waits; draws the next request if nobody does. There may be none yet."""
        if not self.waiting and not self.exhausted:
            try:
                request = next(self._requests)
            except StopIteration:
                self.exhausted = True
                return False
            if request is not None:
                self.waiting.append(Row(request, self._admitted))
                self._admitted += 1
        return bool(self.waiting)

    def _pages_for(self, request: Request, seq_len: int) -> int:
        """Pages that a request has with so many tokens, of which the last that it may have is never written."""
        return -(-min(seq_len, request.max_seq_len - 1) // self.block_size)

    def _enter(self, row: Row, computed: int | None = None) -> None:
        """Enter the row's pages that are full with `computed` tokens."""
        size = self.block_size
        full = (row.computed if computed is None else computed) // size
        if not self.share_prefixes or full <= len(row.entries):
            return
        tokens = row.request.token_ids
        for index in range(len(row.entries), full):
            before = row.entries[-1] if row.entries else ROOT
            row.entries.append(self.pool.enter(row.pages[index], before, tokens[index * size : (index + 1) * size]))

    def _put_back(self, row: Row) -> list[int]:
        """Make an admitted row wait again; returns its index among the live rows, if it was one."""
        index = [index for index, live in enumerate(self.rows) if live is row]
        if index:
            self.remove(index[0])
        else:
            self.prefilling.remove(row)
            self._release(row)
        self.preemptions += 1
        place = sum(waiting.age < row.age for waiting in self.waiting)
        self.waiting.insert(place, row)
        return index

    def _release(self, row: Row) -> None:
        for page in row.pages[row.computed // self.block_size :]:
            self.pool.forget(page)  # promised, and not computed
        self.pool.release(row.pages)
        row.pages, row.entries, row.computed = [], [], 0
