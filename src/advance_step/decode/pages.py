"""Which pages of the KV cache are free."""

from collections.abc import Iterable


class PagePool:
    """The free pages of a cache, in the order in which they are handed out (any permutation will do)."""

    def __init__(self, pages: Iterable[int]) -> None:
        self.free = list(pages)[::-1]  # a stack: the page given back last is the warmest

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages; RuntimeError if fewer are free."""
        if count > len(self.free):
            raise RuntimeError(f"KV cache: expected {count} free pages, got {len(self.free)}")
        return [self.free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Return pages whose row has finished."""
        self.free.extend(reversed(pages))
