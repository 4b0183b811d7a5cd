"""The free list."""

from __future__ import annotations

import pytest

from advance_step.decode.pages import PagePool


def test_pages_come_in_the_given_order():
    pool = PagePool([4, 0, 2])
    assert pool.take(2) == [4, 0]
    assert pool.take(1) == [2]


def test_the_page_given_back_last_is_taken_first():
    pool = PagePool(range(6))
    first, second = pool.take(2), pool.take(2)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.take(6) == [*second, *first, 4, 5]


def test_too_few_pages_is_an_error_and_takes_none():
    pool = PagePool([1, 2])
    with pytest.raises(RuntimeError, match="KV cache: expected 3 free pages, got 2"):
        pool.take(3)
    assert pool.take(2) == [1, 2]
