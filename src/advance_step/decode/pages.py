"""Which pages of the KV cache are free, which are shared, and which hold a prefix that may be wanted again."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = 0  # stands before the first page of a sequence


class PagePool:
    """The pages of a cache, counted by reference.

    A full page may be entered under its prefix: what stands in it, and the entry of the page before it. A sequence that
    begins with the same tokens then shares it. A page that nobody holds any more keeps its entry until the page is
    needed; the longest unused goes first. Entries are compared by their tokens, never by a hash of them.
    """

    def __init__(self, pages: Iterable[int]) -> None:
        """`pages`: the page ids, in the order in which they are handed out (any permutation will do)."""
        self._free = list(pages)[::-1]  # a stack: the page given back last is the warmest
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # entered pages that nobody holds, the longest unused first
        self._entries: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (entry before, tokens): page, entry
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._last_entry = ROOT
        self.size = len(self._free)

    @property
    def available(self) -> int:
        """Pages that `take` could hand out now."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages; RuntimeError if fewer are available."""
        if count > self.available:
            raise RuntimeError(f"KV cache: expected {count} free pages, got {self.available}")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._holders |= dict.fromkeys(pages, 1)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give back a sequence's pages, in its order; RuntimeError for a page that nobody holds."""
        for page in reversed(pages):  # the end of a prefix is evicted before its beginning
            if page not in self._holders:
                raise RuntimeError(f"KV cache: page {page} was given back twice")
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def share(self, tokens: Sequence[int], block_size: int) -> tuple[list[int], list[int]]:
        """Hold the pages that are there already of a sequence with these tokens: pages and their entries, in order."""
        pages, entries, before = [], [], ROOT
        for start in range(0, len(tokens) - block_size + 1, block_size):
            found = self._entries.get((before, tuple(tokens[start : start + block_size])))
            if found is None:
                break
            page, before = found
            pages.append(page)
            entries.append(before)
            self._holders[page] = self._holders.get(page, 0) + 1
            self._idle.pop(page, None)
        return pages, entries

    def enter(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """Enter a full, held page under its prefix; returns the entry to give as `before` of the next page."""
        key = (before, tuple(tokens))
        if key not in self._entries:  # otherwise somebody else computed the same, and theirs is as good
            self._last_entry += 1
            self._entries[key] = page, self._last_entry
            self._key_of[page] = key
        return self._entries[key][1]

    def forget(self, page: int) -> None:
        """Take the page's entry back, if it has one: what was promised of it was not computed."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._entries[key]

    def forget_all(self) -> None:
        """Take back every entry: what stands in the pages is not what it was promised to be."""
        for page in list(self._key_of):
            self.forget(page)
        self._free.extend(self._idle)
        self._idle.clear()

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self.forget(page)
        return page
