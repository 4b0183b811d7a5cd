"""Pages, counted by reference, and the prefixes that they keep."""

from __future__ import annotations

import pytest

from advance_step.decode.pages import ROOT, PagePool


def test_a_page_is_handed_out_once():
    pool = PagePool(range(5))
    assert pool.take(2) == [0, 1] and pool.take(3) == [2, 3, 4]
    assert pool.available == 0


def test_too_many_pages_are_refused_and_none_is_taken():
    pool = PagePool(range(3))
    with pytest.raises(RuntimeError, match="expected 4 free pages, got 3"):
        pool.take(4)
    assert pool.available == 3


def test_pages_given_back_are_handed_out_again():
    pool = PagePool([4, 2, 7])
    taken = pool.take(3)
    pool.release(taken[:2])
    assert pool.take(2) == [4, 2]


def test_a_page_given_back_twice_is_an_error():
    pool = PagePool(range(3))
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="page 0 was given back twice"):
        pool.release(pages)


def entered(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages of two tokens with these, entered under their prefixes."""
    pages, before = pool.take(len(tokens) // 2), ROOT
    for index, page in enumerate(pages):
        before = pool.enter(page, before, tokens[2 * index : 2 * index + 2])
    return pages


def test_the_same_beginning_is_shared():
    pool = PagePool(range(8))
    pages = entered(pool, [1, 2, 3, 4, 5, 6])
    assert pool.share([1, 2, 3, 4, 9, 9], 2)[0] == pages[:2]
    assert pool.share([3, 4], 2)[0] == []  # the same tokens elsewhere
    assert pool.share([1, 2, 3], 2)[0] == pages[:1]  # of a page that is full
    assert pool.available == 5


def test_a_shared_page_is_free_when_nobody_holds_it():
    pool = PagePool(range(2))
    pages = entered(pool, [1, 2])
    pool.share([1, 2], 2)
    pool.release(pages)
    assert pool.available == 1
    pool.release(pages)
    assert pool.available == 2


def test_pages_stay_shared_until_they_are_needed_the_longest_unused_first():
    pool = PagePool(range(4))
    old, new = entered(pool, [1, 2, 3, 4]), entered(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.take(1) == [old[1]]  # the end of a prefix before its beginning
    assert pool.share([1, 2, 3, 4], 2)[0] == old[:1]
    assert pool.share([5, 6, 7, 8], 2)[0] == new


def test_what_was_not_computed_is_forgotten():
    pool = PagePool(range(4))
    pages = entered(pool, [1, 2, 3, 4])
    pool.forget(pages[1])
    assert pool.share([1, 2, 3, 4], 2)[0] == pages[:1]
    pool.release(pages)
    pool.release(pages[:1])
    pool.forget_all()
    assert pool.share([1, 2], 2)[0] == [] and pool.available == 4


def test_a_page_keeps_its_first_entry():
    pool = PagePool(range(4))
    first, second = pool.take(2)
    assert pool.enter(first, ROOT, [1, 2]) == pool.enter(second, ROOT, [1, 2])
    pool.release([first, second])
    assert pool.share([1, 2], 2)[0] == [first]
