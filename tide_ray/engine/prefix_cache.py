"""Which full K/V pages are shared: a tree of pages by the tokens they hold, over the pool of free pages.

A node is one full page, the ``page_size`` tokens after its parent's. Pages are found by comparing tokens, so what is
found is what would have been computed. K/V also carry the policy that made them: each has a tree of its own, told by a
tag. A page that no sequence holds any more stays in its tree, and counts as free, until its memory is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from tide_ray.engine.kv_cache import PAGES_PER_EXTENT, PagePool


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A full page, and the pages that continue it. ``ref_count``: sequences that hold it, and so all its parents.

    ``is_computed``: the launch that fills it has ended well.
    """

    tokens: tuple[int, ...]
    page: int
    parent: PrefixNode | None
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    ref_count: int = 0
    is_computed: bool = False


class PrefixCache(PagePool):
    """Page numbers to allocate, and full pages to find again.

    A page becomes findable when the launch that fills it is scheduled: in every layer a launch writes its K/V before
    it attends, so sequences of the same launch can share it already. Should the launch fail, whoever holds such a page
    must let go of it, and it is not found any more.

    Args:
        page_size: tokens per page.
        is_on: without, nothing is ever found.
    """

    def __init__(self, num_pages: int, page_size: int, *, is_on: bool = True) -> None:
        super().__init__(num_pages)
        self.page_size = page_size
        self.is_on = is_on
        self._roots: dict[Hashable, PrefixNode] = {}
        self._idle: OrderedDict[PrefixNode, None] = OrderedDict()  # held by nobody, released longest ago first
        self._launched: list[PrefixNode] = []  # added for a launch that has not ended

    @property
    def num_idle(self) -> int:
        """Pages that can be found and are held by nobody."""
        return len(self._idle)

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_idle

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """As ``PagePool.allocate``.

        Idle pages count as free. The oldest are given up once no others are left, or where a sequence starts and no
        extent is free.
        """
        if count > self.num_free:
            return None
        if count and after is None:
            self._free_an_extent()
        while len(self._free) < count:
            self._forget_oldest()
        return super().allocate(count, after)

    def find(self, tag: Hashable, token_ids: Sequence[int], limit: int) -> list[PrefixNode]:
        """The longest run of whole pages with the first of ``token_ids``, at most ``limit`` of them. It holds none."""
        found: list[PrefixNode] = []
        node = self._roots.get(tag)
        while node is not None and (end := (len(found) + 1) * self.page_size) <= limit:
            node = node.children.get(tuple(token_ids[end - self.page_size : end]))
            if node is not None:
                found.append(node)
        return found

    def hold(self, nodes: Sequence[PrefixNode]) -> None:
        """Keep pages that were found. Whoever holds a page holds its parents."""
        for node in nodes:
            self._idle.pop(node, None)
            node.ref_count += 1

    def add(
        self, tag: Hashable, prefix: Sequence[PrefixNode], tokens: tuple[int, ...], page: int, *, is_computed: bool
    ) -> PrefixNode | None:
        """Make ``page``, which holds ``tokens`` after those of ``prefix``, findable; the caller holds it.

        None, and the page stays the caller's own, if there is such a page already.

        Args:
            is_computed: False: the next launch fills it.
        """
        parent = prefix[-1] if prefix else self._roots.setdefault(tag, PrefixNode((), -1, None))
        if not self.is_on or tokens in parent.children:
            return None
        node = parent.children[tokens] = PrefixNode(tokens, page, parent, ref_count=1, is_computed=is_computed)
        if not is_computed:
            self._launched.append(node)
        return node

    def let_go(self, nodes: Sequence[PrefixNode]) -> None:
        """Give back pages that were held or added, from the first of a sequence on."""
        for node in reversed(nodes):  # deepest first: an idle page's children are idle for longer, so they go first
            node.ref_count -= 1
            if not node.ref_count:
                if node.is_computed:
                    self._idle[node] = None
                else:
                    self._take_out(node)

    def launch_ended(self) -> None:
        """All pages that were added for it are computed."""
        for node in self._launched:
            node.is_computed = True
        self._launched.clear()

    def clear(self) -> None:
        """Forget every page that nobody holds."""
        while self._idle:
            self._forget_oldest()

    def _free_an_extent(self) -> None:
        """Make room for a sequence's pages to lie together: the oldest idle ones were of one sequence, mostly."""
        for _ in range(PAGES_PER_EXTENT):
            if self.has_free_extent or not self._idle:
                return
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._take_out(self._idle.popitem(last=False)[0])

    def _take_out(self, node: PrefixNode) -> None:
        assert node.parent is not None, "a root has no page"
        assert not node.children, "children go before their parent"
        del node.parent.children[node.tokens]
        self.release([node.page])
