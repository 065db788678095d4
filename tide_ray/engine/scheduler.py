"""Which rows the next launch runs: the first of the engine's three verbs (schedule, run, commit).

Decode rows first, then prefill chunks of residents, then newly admitted sequences, within ``max_rows`` per launch.
Pages are taken as tokens need them; when none is left the sequence admitted last gives its own back and is computed
again later (its tokens are kept, so its answer does not change). Full pages that begin a prompt are looked up first
(``prefix_cache``), and only what follows them is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tide_ray.engine.prefix_cache import PrefixCache
from tide_ray.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSpan:
    """``count`` tokens of a sequence from its first uncomputed one. ``samples``: the last row chooses a new token."""

    sequence: Sequence
    count: int
    is_decode: bool

    @property
    def samples(self) -> bool:
        return self.count == self.sequence.num_uncomputed


class Scheduler:
    """Owns the waiting and resident sequences and the free pages.

    Args:
        pool: free K/V pages, and those that can be shared.
        max_residents: most sequences that hold pages at a time.
        max_rows: most rows of one launch.
        full_depth: depth of tokens that did not exit early.
        prefill_tail: last tokens of a prompt that always run every layer.
        clock: microseconds, for admission times.
    """

    def __init__(
        self,
        pool: PrefixCache,
        *,
        max_residents: int,
        max_rows: int,
        full_depth: int,
        prefill_tail: int = 1,
        clock: Callable[[], int],
    ) -> None:
        self.pool = pool
        self.max_residents = max_residents
        self.max_rows = max_rows
        self.full_depth = full_depth
        self.prefill_tail = prefill_tail
        self.clock = clock
        self.waiting: deque[Sequence] = deque()
        self.residents: list[Sequence] = []
        self.num_preemptions = 0
        self._is_launched = False
        self._free_slots = list(range(max_residents - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.residents)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its pages."""
        self._free_pages(sequence)
        if sequence in self.residents:
            self._evict(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[ScheduledSpan]:
        """The spans of the next launch of stage 0, decode spans first.

        Empty when there is no work, or when every resident waits for a deeper stage (see ``waiting_for_stage``).
        """
        if self._is_launched:
            self._start_again()
        self._is_launched = True
        decode = self._schedule_decode()
        budget = self.max_rows - len(decode)
        prefill: list[ScheduledSpan] = []
        for sequence in [s for s in self.residents if not s.is_decoding]:
            if budget <= 0:
                break
            prefill.append(self._prefill_span(sequence, budget))
            budget -= prefill[-1].count
        while budget > 0 and (admitted := self._admit()) is not None:
            prefill.append(self._prefill_span(admitted, budget))
            budget -= prefill[-1].count
        return decode + prefill

    def launched(self, spans: Seq[ScheduledSpan], choosing: Seq[Sequence]) -> None:
        """What the last ``schedule`` returned has been queued, and with it a token for each sequence of ``choosing``.

        Its rows count as computed from now on: whatever is queued later finds them so. Without this the next
        ``schedule`` takes the launch to have failed.
        """
        self._is_launched = False
        self.pool.launch_ended()
        for span in spans:
            if not span.is_decode:  # a row that decodes counts once its token is chosen, which may be steps later
                span.sequence.num_computed += span.count - bool(span.sequence.stage)
        for sequence in choosing:
            sequence.num_computed = sequence.num_tokens
            sequence.num_ahead += 1

    def launch_failed(self, choosing: Seq[Sequence]) -> None:
        """Something went wrong since the last ``schedule``: tokens ahead are lost, and all residents start again."""
        self._is_launched = True
        for sequence in choosing:
            sequence.num_ahead = 0

    def token_chosen(self, sequence: Sequence) -> None:
        """Its newest token was noted, and all before it are computed: a page of the answer may have become full."""
        num_computed = len(sequence.prompt_ids) + len(sequence.output_ids) - 1
        is_resident = sequence.num_computed >= num_computed  # it may have been preempted since the token was chosen
        if is_resident and num_computed % self.pool.page_size == 0:
            self._share(sequence, num_computed, is_computed=True)

    def take_back_drafts(self, sequence: Sequence, num_right: int) -> None:
        """Full depth has seen its drafts: all of them are taken from it.

        The positions of the first ``num_right``, and the one that chose the next token, stay computed. What was
        computed behind them, and pages for it, was for nothing.
        """
        sequence.num_computed -= len(sequence.drafts) - num_right
        sequence.drafts.clear()
        num_pages = self._pages_for(sequence.num_computed + 1)
        self.pool.release(sequence.pages[num_pages:])
        del sequence.pages[num_pages:]

    def waiting_for_stage(self, stage: int) -> list[Sequence]:
        """Residents whose newest token has run every stage before ``stage`` and waits for it."""
        return [s for s in self.residents if s.stage == stage]

    def _schedule_decode(self) -> list[ScheduledSpan]:
        """Every decoding resident up to ``max_rows``, each with a page for its new token."""
        spans: list[ScheduledSpan] = []
        ready = [s for s in self.residents if s.is_decoding and not s.stage and not s.is_ending]
        for sequence in ready[: self.max_rows]:
            if sequence not in self.residents:  # preempted by one before it
                continue
            while not self._grow(sequence):
                if any(s.is_ending for s in self.residents):  # its pages come free once its last token is read
                    break
                victim = self.residents[-1]
                self._preempt(victim)
                spans = [span for span in spans if span.sequence is not victim]
                if victim is sequence:
                    break
            else:
                spans.append(ScheduledSpan(sequence, 1, is_decode=True))
        return spans

    def _prefill_span(self, sequence: Sequence, budget: int) -> ScheduledSpan:
        count = min(budget, sequence.num_uncomputed)
        self._share(sequence, min(sequence.num_computed + count, len(sequence.prompt_ids)), is_computed=False)
        return ScheduledSpan(sequence, count, is_decode=False)

    def _share(self, sequence: Sequence, num_tokens: int, *, is_computed: bool) -> None:
        """Make the full pages of its first ``num_tokens`` tokens findable.

        Up to the first page with a token that exited early, whose K/V, and those of all tokens after it, are not full
        depth's; or up to a page that another sequence had computed first.
        """
        size, prefix = self.pool.page_size, sequence.prefix
        while (end := (len(prefix) + 1) * size) <= num_tokens:
            if any(depth < self.full_depth for depth in sequence.depths(end - size, size)):
                return
            tokens, page = tuple(sequence.tokens(end - size, size)), sequence.pages[len(prefix)]
            node = self.pool.add(sequence.kv_tag, prefix, tokens, page, is_computed=is_computed)
            if node is None:
                return
            prefix.append(node)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)

    def _grow(self, sequence: Sequence) -> bool:
        """Give the sequence the pages that all its known tokens need; False when there are too few."""
        missing = self._pages_for(sequence.num_tokens) - len(sequence.pages)
        if missing > 0:
            pages = self.pool.allocate(missing, after=sequence.pages[-1] if sequence.pages else None)
            if pages is None:
                return False
            sequence.pages.extend(pages)
        return True

    def _admit(self) -> Sequence | None:
        """Make the first waiting sequence resident, if a place and its pages are free.

        One page per resident is kept back, or admission and preemption would chase each other.
        """
        if not self.waiting or len(self.residents) >= self.max_residents:
            return None
        sequence = self.waiting[0]
        if sequence.num_ahead:  # preempted, and not all of its tokens are known
            return None
        reserve = len(self.residents)
        found = self.pool.find(sequence.kv_tag, sequence.prompt_ids, self._most_cached(sequence))
        # Pages that residents hold are had for nothing; idle ones count as free until they are held.
        needed = self._pages_for(sequence.num_tokens) - sum(node.ref_count > 0 for node in found)
        if needed + reserve > self.pool.num_free:
            return None
        self.pool.hold(found)
        sequence.prefix, sequence.pages = found, [node.page for node in found]
        sequence.num_computed = len(found) * self.pool.page_size
        has_grown = self._grow(sequence)
        assert has_grown, "as many pages were free"
        self.waiting.popleft()
        self.residents.append(sequence)
        sequence.slot = self._free_slots.pop()
        if not sequence.admitted_us:
            sequence.admitted_us = self.clock()
            sequence.num_cached_tokens = sequence.num_computed
        return sequence

    def _most_cached(self, sequence: Sequence) -> int:
        """Tokens of its prompt that need not be computed for it: the last one chooses a token.

        Of an answer none: computed again after a preemption, it must come out as it was. Where prompt tokens stop, the
        last ones run every layer for each prompt.
        """
        tail = max(self.prefill_tail, 1) if sequence.exit_rules.prompt_exits else 1
        return len(sequence.prompt_ids) - tail

    def _evict(self, sequence: Sequence) -> None:
        self.residents.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _preempt(self, sequence: Sequence) -> None:
        self._send_back(sequence)
        self.num_preemptions += 1

    def _start_again(self) -> None:
        """The last launch failed: all residents are computed again.

        States that waited for a deeper stage may be lost with it, and pages that it was to fill may be shared by others
        than the sequence that was to fill them.
        """
        for sequence in self.residents[::-1]:
            self._send_back(sequence)

    def _send_back(self, sequence: Sequence) -> None:
        self._evict(sequence)
        self._free_pages(sequence)
        self.waiting.appendleft(sequence)

    def _free_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages[len(sequence.prefix) :])
        self.pool.let_go(sequence.prefix)
        sequence.forget_computed()
