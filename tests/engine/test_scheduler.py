"""The scheduler without a model."""

from __future__ import annotations

import itertools

from tide_ray.engine.prefix_cache import PrefixCache
from tide_ray.engine.scheduler import ScheduledSpan, Scheduler
from tide_ray.engine.sequence import Sequence
from tide_ray.types import SamplingParams


def create_scheduler(
    *, num_pages: int = 100, page_size: int = 4, max_residents: int = 8, max_rows: int = 64
) -> Scheduler:
    ticks = itertools.count(1)
    return Scheduler(
        PrefixCache(num_pages, page_size),
        max_residents=max_residents,
        max_rows=max_rows,
        full_depth=1,
        clock=lambda: next(ticks),
    )


first_tokens = itertools.count(0, 1000)


def create_sequence(name: str, prompt_length: int, *, first_token: int | None = None) -> Sequence:
    """A sequence whose prompt counts up from ``first_token``, by default from one that no other prompt has."""
    start = next(first_tokens) if first_token is None else first_token
    prompt = list(range(start, start + prompt_length))
    return Sequence(name, 0, prompt, SamplingParams(max_tokens=1000), 0, frozenset(), 1000, arrival_us=0)


def run(scheduler: Scheduler, spans: list[ScheduledSpan]) -> None:
    """What the engine does between two schedules: compute the rows, choose a token where one is due."""
    choosing = [span.sequence for span in spans if span.samples]
    scheduler.launched(spans, choosing)
    for sequence in choosing:
        sequence.num_ahead -= 1
        sequence.append(7, 1, None, 0)
        scheduler.token_chosen(sequence)


def shape(spans: list[ScheduledSpan]) -> list[tuple[str, int, bool]]:
    return [(span.sequence.request_id, span.count, span.is_decode) for span in spans]


def test_prompts_are_prefilled_whole_within_the_row_limit() -> None:
    scheduler = create_scheduler(max_rows=10)
    for name, length in (("a", 4), ("b", 5), ("c", 6)):
        scheduler.add(create_sequence(name, length))
    spans = scheduler.schedule()
    assert shape(spans) == [("a", 4, False), ("b", 5, False), ("c", 1, False)]
    assert [span.samples for span in spans] == [True, True, False]


def test_decode_rows_come_first_and_a_chunked_prompt_goes_on() -> None:
    scheduler = create_scheduler(max_rows=10)
    scheduler.add(create_sequence("a", 4))
    scheduler.add(create_sequence("b", 25))
    run(scheduler, scheduler.schedule())
    spans = scheduler.schedule()
    assert shape(spans) == [("a", 1, True), ("b", 9, False)]
    run(scheduler, spans)
    spans = scheduler.schedule()
    assert shape(spans) == [("a", 1, True), ("b", 9, False)]
    run(scheduler, spans)
    assert shape(scheduler.schedule()) == [("a", 1, True), ("b", 1, False)]


def test_a_finished_sequence_is_replaced_in_the_next_launch() -> None:
    scheduler = create_scheduler(max_residents=2)
    sequences = [create_sequence(name, 3) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    run(scheduler, scheduler.schedule())
    scheduler.remove(sequences[0])
    assert shape(scheduler.schedule()) == [("b", 1, True), ("c", 3, False)]


def test_residents_never_exceed_the_limit() -> None:
    scheduler = create_scheduler(max_residents=3)
    for name in "abcdef":
        scheduler.add(create_sequence(name, 2))
    for _ in range(5):
        run(scheduler, scheduler.schedule())
        assert len(scheduler.residents) == 3


def test_without_pages_the_last_admitted_gives_way_and_is_computed_again_from_its_start() -> None:
    scheduler = create_scheduler(num_pages=4, page_size=4)
    first, second = create_sequence("first", 4), create_sequence("second", 3)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        run(scheduler, scheduler.schedule())
        assert first.num_tokens + second.num_tokens < 40
    assert scheduler.residents == [first]
    assert list(scheduler.waiting) == [second]
    assert (second.num_computed, second.pages) == (0, [])
    generated = list(second.output_ids)
    scheduler.remove(first)
    span = scheduler.schedule()[0]
    assert span.sequence is second
    assert span.count == 3 + len(generated)
    assert not span.is_decode
    assert span.samples


def test_pages_are_conserved_over_a_crowded_run() -> None:
    scheduler = create_scheduler(num_pages=6, page_size=2, max_residents=4, max_rows=5)
    sequences = [create_sequence(f"s{i}", 1 + i % 4) for i in range(12)]
    for sequence in sequences:
        scheduler.add(sequence)
    finished = 0
    for _ in range(2000):
        if not scheduler.has_work:
            break
        spans = scheduler.schedule()
        assert spans, "work without a launch would hang the engine"
        assert sum(span.count for span in spans) <= 5
        run(scheduler, spans)
        for span in spans:
            if len(span.sequence.output_ids) >= 6 and span.sequence.finish_reason is None:
                span.sequence.finish_reason = "length"
                scheduler.remove(span.sequence)
                finished += 1
        held = sum(len(sequence.pages) for sequence in sequences)
        assert held + scheduler.pool.num_free == 6
    assert finished == 12
    assert scheduler.num_preemptions > 0


def test_removing_a_waiting_sequence_leaves_the_others() -> None:
    scheduler = create_scheduler(max_residents=1)
    sequences = [create_sequence(name, 2) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.remove(sequences[1])
    run(scheduler, scheduler.schedule())
    scheduler.remove(sequences[0])
    assert shape(scheduler.schedule()) == [("c", 2, False)]


# ---- tokens that have not been read ----


def launch(scheduler: Scheduler) -> list[ScheduledSpan]:
    """Schedule and queue a launch whose tokens stay ahead."""
    spans = scheduler.schedule()
    scheduler.launched(spans, [span.sequence for span in spans if span.samples])
    return spans


def read(scheduler: Scheduler, sequence: Sequence) -> None:
    sequence.num_ahead -= 1
    sequence.append(7, 1, None, 0)
    scheduler.token_chosen(sequence)


def test_a_sequence_goes_on_from_a_token_that_is_ahead_unless_it_is_its_last() -> None:
    scheduler = create_scheduler()
    sequence = create_sequence("a", 3)
    sequence.max_tokens = 2
    scheduler.add(sequence)
    assert shape(launch(scheduler)) == [("a", 3, False)]
    assert (sequence.num_tokens, sequence.num_computed, sequence.is_ending) == (4, 3, False)
    assert shape(launch(scheduler)) == [("a", 1, True)]
    read(scheduler, sequence)
    assert sequence.is_ending
    assert launch(scheduler) == []
    assert scheduler.residents == [sequence]


def test_what_was_preempted_waits_until_its_tokens_are_known() -> None:
    scheduler = create_scheduler(num_pages=4, page_size=4)
    first, second = create_sequence("first", 7), create_sequence("second", 3)
    scheduler.add(first)
    scheduler.add(second)
    assert shape(launch(scheduler)) == [("first", 7, False), ("second", 3, False)]
    assert shape(launch(scheduler)) == [("first", 1, True), ("second", 1, True)]
    read(scheduler, first)
    read(scheduler, second)
    assert shape(launch(scheduler)) == [("first", 1, True)]
    assert (second.num_computed, second.pages, second.num_ahead) == (0, [], 1)
    scheduler.remove(first)
    assert launch(scheduler) == [], "its pages are free, but not all of its tokens are known"
    read(scheduler, second)
    assert shape(launch(scheduler)) == [("second", 5, False)]


def test_pages_of_a_sequence_that_is_ending_are_waited_for() -> None:
    scheduler = create_scheduler(num_pages=3, page_size=4)
    first, second = create_sequence("first", 4), create_sequence("second", 3)
    first.max_tokens = 2
    scheduler.add(first)
    scheduler.add(second)
    launch(scheduler)
    assert shape(launch(scheduler)) == [("first", 1, True), ("second", 1, True)]
    for sequence in (first, second):
        read(scheduler, sequence)
    assert launch(scheduler) == [], "second needs a page, and first has its last token ahead"
    assert scheduler.num_preemptions == 0
    read(scheduler, first)
    scheduler.remove(first)
    assert shape(launch(scheduler)) == [("second", 1, True)]


def test_pages_of_an_answer_are_shared_once_their_tokens_are_known() -> None:
    scheduler = create_scheduler(page_size=4)
    sequence = create_sequence("a", 3)
    scheduler.add(sequence)
    launch(scheduler)
    launch(scheduler)
    assert sequence.num_computed == 4
    assert not sequence.prefix
    read(scheduler, sequence)
    assert not sequence.prefix, "the page's last token has no depth yet"
    launch(scheduler)
    read(scheduler, sequence)
    assert [node.tokens for node in sequence.prefix] == [(*sequence.prompt_ids, 7)]


def test_after_a_failure_nothing_is_ahead_and_all_start_again() -> None:
    scheduler = create_scheduler()
    sequences = [create_sequence(name, 3) for name in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    launch(scheduler)
    scheduler.launch_failed(sequences)
    assert shape(launch(scheduler)) == [("a", 3, False), ("b", 3, False)]
    assert [sequence.num_ahead for sequence in sequences] == [1, 1]
