"""Amounts over time in a bounded number of bins, and a bounded sample of what was seen."""

import random
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

MAX_BINS = 240
FIRST_WIDTH = 0.01  # seconds

Item = TypeVar("Item")


class Timeline:
    """Sums of amounts in at most MAX_BINS bins of `width` seconds, from 0 on; time that outgrows them doubles it."""

    def __init__(self) -> None:
        self.width = FIRST_WIDTH
        self.num_bins = 0
        self._sums: dict[Hashable, list[float]] = {}

    def add(self, begin: float, end: float, amounts: Mapping[Hashable, float]) -> None:
        """Spread each amount evenly over the seconds [begin, end]."""
        while end >= self.width * MAX_BINS:
            self._double()
        first, last = int(begin / self.width), int(end / self.width)
        self.num_bins = max(self.num_bins, last + 1)
        for index in range(first, last + 1):
            share = 1.0
            if end > begin:
                share = min(end, (index + 1) * self.width) - max(begin, index * self.width)
                share = max(share, 0.0) / (end - begin)
            for name, amount in amounts.items():
                self._bins(name)[index] += share * amount

    def sums(self, name: Hashable) -> list[float]:
        """What each bin has of an amount."""
        return self._bins(name)[: self.num_bins]

    def _bins(self, name: Hashable) -> list[float]:
        bins = self._sums.get(name)
        if bins is None:
            bins = self._sums[name] = [0.0] * MAX_BINS
        return bins

    def _double(self) -> None:
        """Each two bins become one."""
        self.width *= 2
        self.num_bins = -(-self.num_bins // 2)
        for bins in self._sums.values():
            bins[:] = [a + b for a, b in zip(bins[::2], bins[1::2], strict=True)] + [0.0] * (MAX_BINS // 2)


class Sample(Generic[Item]):
    """All that is added, up to `size`; of more, so many, each as likely as any other (reservoir sampling).

    count: how many were added.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.items: list[Item] = []
        self._random = random.Random(0)

    def add(self, item: Item) -> None:
        """Add one."""
        self.count += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := self._random.randrange(self.count)) < self.size:
            self.items[place] = item
