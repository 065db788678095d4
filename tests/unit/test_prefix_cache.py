"""The tree of shared pages without a model."""

from __future__ import annotations

import random

import pytest

from references import cached_nodes
from tide_ray.engine import kv_cache
from tide_ray.engine.kv_cache import PAGES_PER_EXTENT
from tide_ray.engine.prefix_cache import PrefixCache, PrefixNode

PAGE_SIZE = 4


def hold_all(
    cache: PrefixCache, token_ids: list[int], tag: str = "full", limit: int = 1000
) -> tuple[list[PrefixNode], list[int]] | None:
    """What a sequence does with its whole pages: find, allocate the rest, share it. Its nodes and its own pages, or
    None when too few are free."""
    nodes = cache.find(tag, token_ids, min(limit, len(token_ids)))
    num_needed = len(token_ids) // PAGE_SIZE - len(nodes)
    if num_needed + sum(not node.ref_count for node in nodes) > cache.num_free:
        return None
    cache.hold(nodes)
    own = cache.allocate(num_needed)
    assert own is not None
    while own:
        start = len(nodes) * PAGE_SIZE
        node = cache.add(tag, nodes, tuple(token_ids[start : start + PAGE_SIZE]), own[0], is_computed=True)
        if node is None:
            break
        nodes.append(node)
        own.pop(0)
    return nodes, own


def remember(cache: PrefixCache, token_ids: list[int], tag: str = "full") -> list[int]:
    """Let a sequence come and go; its pages."""
    held = hold_all(cache, token_ids, tag)
    assert held is not None
    nodes, own = held
    cache.release(own)
    cache.let_go(nodes)
    return [node.page for node in nodes]


def found(cache: PrefixCache, token_ids: list[int], limit: int = 1000, tag: str = "full") -> list[int]:
    return [node.page for node in cache.find(tag, token_ids, min(limit, len(token_ids)))]


def test_the_longest_run_of_whole_pages_is_found() -> None:
    cache = PrefixCache(10, PAGE_SIZE)
    pages = remember(cache, list(range(12)))
    assert found(cache, list(range(12))) == pages
    assert found(cache, [*range(11), 99]) == pages[:2]
    assert found(cache, [*range(4), 99, *range(5, 12)]) == pages[:1], "what follows another page is another page"
    assert found(cache, list(range(4, 12))) == []
    assert found(cache, list(range(3))) == []
    assert [len(found(cache, list(range(12)), limit)) for limit in (-5, 3, 4, 7, 8, 11, 12)] == [0, 0, 1, 1, 2, 2, 3]


def test_pages_are_found_under_their_own_tag_only() -> None:
    cache = PrefixCache(10, PAGE_SIZE)
    pages = remember(cache, list(range(8)), "full")
    assert found(cache, list(range(8)), tag="stops") == []
    others = remember(cache, list(range(8)), "stops")
    assert not set(pages) & set(others)
    assert found(cache, list(range(8)), tag="full") == pages


def test_the_first_page_with_some_tokens_stays_and_the_second_is_its_owners() -> None:
    cache = PrefixCache(10, PAGE_SIZE)
    first, second = cache.allocate(2)  # type: ignore[misc]
    node = cache.add("full", [], (1, 2, 3, 4), first, is_computed=True)
    assert node is not None
    assert cache.add("full", [], (1, 2, 3, 4), second, is_computed=True) is None
    assert found(cache, [1, 2, 3, 4]) == [first]


def test_pages_that_nobody_holds_count_as_free_and_go_last_used_last_and_children_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "PAGES_PER_EXTENT", 1)  # no page is given up for the sake of its neighbours
    cache = PrefixCache(6, PAGE_SIZE)
    remember(cache, [1] * 8)
    remember(cache, [2] * 8)
    remember(cache, [1] * 4)  # used again, without its second page
    assert (cache.num_free, cache.num_idle) == (6, 4)
    left = []
    for _ in range(6):
        assert cache.allocate(1) is not None
        left.append((len(found(cache, [1] * 8)), len(found(cache, [2] * 8))))
    assert left == [(2, 2), (2, 2), (1, 2), (1, 1), (1, 0), (0, 0)]
    assert cache.num_free == 0
    assert cache.allocate(1) is None


def test_a_sequence_that_starts_takes_the_oldest_idle_ones_place_when_no_extent_is_free() -> None:
    """Else its pages would lie wherever one is free, and reading them would take twice as long."""
    cache = PrefixCache(3 * PAGES_PER_EXTENT, PAGE_SIZE)
    starts = [remember(cache, [token] * 8)[0] for token in (1, 2, 3)]
    assert not cache.has_free_extent
    assert cache.num_free == 3 * PAGES_PER_EXTENT
    assert cache.allocate(4) == list(range(starts[0], starts[0] + 4))
    assert [len(found(cache, [token] * 8)) for token in (1, 2, 3)] == [0, 2, 2]


def test_a_page_that_is_held_is_never_given_up() -> None:
    cache = PrefixCache(4, PAGE_SIZE)
    remember(cache, [1] * 8)
    cache.hold(cache.find("full", [1] * 8, 4))
    assert cache.num_free == 3
    assert cache.allocate(4) is None
    assert len(found(cache, [1] * 8)) == 2, "what cannot be had in full must not be begun"
    assert cache.allocate(3) is not None
    assert len(found(cache, [1] * 8)) == 1


def test_a_page_of_a_launch_that_failed_goes_with_its_last_holder() -> None:
    cache = PrefixCache(4, PAGE_SIZE)
    (page,) = cache.allocate(1)  # type: ignore[misc]
    node = cache.add("full", [], (1, 1, 1, 1), page, is_computed=False)
    assert node is not None
    cache.hold([node])
    cache.let_go([node])
    assert found(cache, [1] * 4) == [page]
    cache.let_go([node])
    assert (found(cache, [1] * 4), cache.num_idle, cache.num_free) == ([], 0, 4)
    cache.launch_ended()
    assert (found(cache, [1] * 4), cache.num_idle, cache.num_free) == ([], 0, 4)


def test_a_page_of_a_launch_that_ended_stays() -> None:
    cache = PrefixCache(4, PAGE_SIZE)
    (page,) = cache.allocate(1)  # type: ignore[misc]
    node = cache.add("full", [], (1, 1, 1, 1), page, is_computed=False)
    assert node is not None
    cache.launch_ended()
    cache.let_go([node])
    assert found(cache, [1] * 4) == [page]
    cache.clear()
    assert (found(cache, [1] * 4), cache.num_idle, cache.num_free) == ([], 0, 4)


def test_switched_off_nothing_is_found() -> None:
    cache = PrefixCache(4, PAGE_SIZE, is_on=False)
    assert remember(cache, [1] * 8) == []
    assert (found(cache, [1] * 8), cache.num_idle, cache.num_free) == ([], 0, 4)


@pytest.mark.parametrize("seed", range(5))
def test_over_any_use_pages_are_conserved_and_counted(seed: int) -> None:
    chance = random.Random(seed)
    cache = PrefixCache(24, PAGE_SIZE)
    holders: list[tuple[list[PrefixNode], list[int]]] = []
    num_refused = 0
    for _ in range(3000):
        if holders and chance.random() < 0.5:
            nodes, own = holders.pop(chance.randrange(len(holders)))
            cache.release(own)
            cache.let_go(nodes)
        else:
            token_ids = [t for _ in range(chance.randint(1, 5)) for t in [chance.randint(0, 2)] * PAGE_SIZE]
            tag = chance.choice(["full", "stops"])
            # A match may be shorter than what there is, as a prompt must compute its end.
            held = hold_all(cache, token_ids, tag, chance.randint(0, len(token_ids)))
            num_refused += held is None
            holders += [held] if held is not None else []
        tree = cached_nodes(cache)
        for node in tree:
            assert node.ref_count == sum(node in nodes for nodes, _ in holders)
        owned = [page for _, own in holders for page in own]
        assert sorted([*cache._free, *owned, *(node.page for node in tree)]) == list(range(24))
        assert cache.num_idle == sum(not node.ref_count for node in tree)
    assert num_refused > 50
