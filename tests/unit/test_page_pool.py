"""Page numbers: handed out once, one after another where there is room."""

from __future__ import annotations

import random

from tide_ray.engine.kv_cache import PAGES_PER_EXTENT, PagePool


def grow(pool: PagePool, pages: list[int], count: int) -> None:
    more = pool.allocate(count, after=pages[-1] if pages else None)
    assert more is not None
    pages += more


def test_sequences_that_grow_in_turn_keep_their_pages_together() -> None:
    """Pages came from one list, so that those of sequences that decode together lay between one another."""
    pool = PagePool(10 * PAGES_PER_EXTENT)
    sequences: list[list[int]] = [[] for _ in range(5)]
    for pages in sequences:
        grow(pool, pages, 3)
    for _ in range(PAGES_PER_EXTENT - 3):
        for pages in sequences:
            grow(pool, pages, 1)
    for pages in sequences:
        assert pages == list(range(pages[0], pages[0] + PAGES_PER_EXTENT))
        assert pages[0] % PAGES_PER_EXTENT == 0


def test_a_long_sequence_goes_on_in_the_next_extent_while_it_is_free() -> None:
    pool = PagePool(6 * PAGES_PER_EXTENT)
    first = pool.allocate(3 * PAGES_PER_EXTENT)
    assert first is not None
    assert first == list(range(first[0], first[0] + len(first)))
    pool = PagePool(6 * PAGES_PER_EXTENT)
    one, other = pool.allocate(PAGES_PER_EXTENT), pool.allocate(1)
    assert one is not None
    assert other == [PAGES_PER_EXTENT]
    assert pool.allocate(1, after=one[-1]) == [2 * PAGES_PER_EXTENT], "the next extent is another's"


def test_when_no_extent_is_free_every_page_is_still_had() -> None:
    pool = PagePool(2 * PAGES_PER_EXTENT + 3)
    starts = [pool.allocate(1) for _ in range(3)]
    assert None not in starts
    left = pool.allocate(pool.num_free)
    assert left is not None
    assert sorted([*left, *(page for start in starts for page in start or [])]) == list(range(pool.num_pages))
    assert pool.allocate(1) is None
    pool.release(left)
    assert pool.num_free == len(left)


def test_no_page_is_lost_or_given_twice_in_a_long_run() -> None:
    pool, rng = PagePool(61), random.Random(0)
    held: list[list[int]] = []
    for _ in range(3000):
        if held and rng.random() < 0.4:
            pool.release(held.pop(rng.randrange(len(held))))
        elif held and rng.random() < 0.6:
            pages = rng.choice(held)
            more = pool.allocate(1, after=pages[-1])
            pages += more or []
        else:
            pages = pool.allocate(rng.randint(1, 12)) or []
            held += [pages] if pages else []
        used = [page for pages in held for page in pages]
        assert len(used) == len(set(used)) == pool.num_pages - pool.num_free
    assert len(pool._free_extents) <= 61 // PAGES_PER_EXTENT + 1
