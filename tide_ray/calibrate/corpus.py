"""What routers are calibrated on: the model's own answers to prompts, or given text; split by prompt."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.data.locate import open_sources
from tide_ray.data.prompts import RowMaker, prompt_columns
from tide_ray.engine.engine import TideEngine
from tide_ray.types import Prompt, SamplingParams, UserError

SPLITS = (("fit", 0.5), ("gate", 0.25), ("calibrate", 0.125), ("test", 0.125))
MIN_SEQUENCES = 16
MIN_TEXT_TOKENS = 16
Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, from 0 to 1."""
REQUEST = "calibrate-"
"""Requests are named after the numbers of their prompts."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. Rows from ``first_judged`` on predict tokens that are the model's own (or, of a text, all).

    ``last_id``: the answer's last token, which was chosen but never run; -1: not known.
    """

    token_ids: list[int]
    first_judged: int
    last_id: int = -1

    @property
    def prompt_ids(self) -> list[int]:
        return self.token_ids[: self.first_judged + 1]

    @property
    def answer_ids(self) -> list[int]:
        """What its judged rows chose."""
        return [*self.token_ids[self.first_judged + 1 :], self.last_id]


Splits = dict[str, list[Example]]


def answers(config: CalibrationConfig, engine: TideEngine, progress: Progress) -> list[Example]:
    """The examples that ``config`` asks for, in the order of their prompts or paragraphs.

    Raises:
        UserError: they cannot be read, or are too few.
    """
    if config.text is not None:
        return read_text(config.text, engine, limit=config.num_prompts, max_tokens=config.max_tokens)
    prompts = read_prompts(config.prompts, column=config.prompt_column, limit=config.num_prompts)
    return list(answer(prompts, config, engine, progress).values())


def answer(
    prompts: Sequence[Prompt], config: CalibrationConfig, engine: TideEngine, progress: Progress
) -> dict[int, Example]:
    """The model's own answers by the number of their prompt, rising; prompts that it rejects are left out."""
    if not config.raw and getattr(engine.tokenizer, "chat_template", None):
        prompts = [as_chat(prompt) for prompt in prompts]
    examples = {}
    for number, example in answered(engine, prompts, config.max_tokens):
        examples[number] = example
        progress("the model answers the prompts", len(examples) / len(prompts))
    return dict(sorted(examples.items()))


def as_chat(prompt: Prompt) -> Prompt:
    """A string as what a user says; other prompts are given."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def read_prompts(sources: Sequence[str], *, column: str | None, limit: int | None) -> list[Prompt]:
    """Prompts from files or data sets, as a job would read them; rows that a job would reject are left out.

    Raises:
        UserError: nothing to read, or fewer than ``limit`` usable rows.
    """
    return [prompt for prompt, _ in read_rows(sources, column=column, limit=limit)]


def read_rows(
    sources: Sequence[str], *, column: str | None, limit: int | None, also: Sequence[str] = ()
) -> list[tuple[Prompt, dict[str, Any]]]:
    """Prompts as ``read_prompts`` gives them, each with the values of its row; ``also``: further columns to read."""
    maker = RowMaker(SamplingParams(temperature=0))
    rows: list[tuple[Prompt, dict[str, Any]]] = []
    for source in open_sources(list(sources)):
        columns = prompt_columns(source, column)
        for batch in source.batches([*columns, *also], source.schema([])):
            for row in batch.rows:
                made = maker.make(row, columns)
                if made.error:
                    continue
                if made.messages is not None:
                    rows.append((json.loads(made.messages), row.values))
                elif made.prompt_token_ids is not None:
                    rows.append((made.prompt_token_ids, row.values))
                elif made.prompt is not None:
                    rows.append((made.prompt, row.values))
                if limit is not None and len(rows) == limit:
                    return rows
    if limit is not None and len(rows) < limit:
        raise UserError(f"num_prompts: the sources have {len(rows)} usable prompts, got {limit}")
    return rows


def answered(engine: TideEngine, prompts: Sequence[Prompt], max_tokens: int) -> Iterable[tuple[int, Example]]:
    """The model's own greedy answers, as they finish, each with its prompt's number; prompts that the engine rejects
    are left out."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{REQUEST}{number}", prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = output.outputs[0].token_ids
            if not output.error and tokens:
                ids = [*output.prompt_token_ids, *tokens[:-1]]
                example = Example(ids, len(output.prompt_token_ids) - 1, tokens[-1])
                yield int(output.request_id.removeprefix(REQUEST)), example


def read_text(path: str, engine: TideEngine, *, limit: int | None, max_tokens: int) -> list[Example]:
    """Paragraphs of a text file, one per line, each cut to ``max_tokens``; very short ones are left out.

    Raises:
        UserError: the file cannot be read, or has fewer than ``limit`` such paragraphs.
    """
    examples = [Example(ids, 0) for ids in itertools.islice(paragraphs(path, engine, max_tokens), limit)]
    if limit is not None and len(examples) < limit:
        raise UserError(f"num_prompts: {path!r} has {len(examples)} paragraphs, got {limit}")
    return examples


def paragraphs(path: str, engine: TideEngine, max_tokens: int) -> Iterator[list[int]]:
    """Token ids of a text file's paragraphs, as ``read_text`` takes them.

    Raises:
        UserError: the file cannot be read.
    """
    if engine.tokenizer is None:
        raise UserError("text needs a tokenizer, the model folder has none")
    for line in read_lines(path):
        if text := line.strip():
            ids = list(engine.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])
            if len(ids) >= min(MIN_TEXT_TOKENS, max_tokens):
                yield ids


def read_lines(path: str) -> list[str]:
    """The lines of a text file. Raises UserError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text must be a UTF-8 text file, got {path!r} ({type(error).__name__})") from None


def split(examples: Sequence[Example], seed: int) -> Splits:
    """Disjoint sets of prompts, in an order of ``seed``.

    Raises:
        UserError: too few to split.
    """
    if len(examples) < MIN_SEQUENCES:
        raise UserError(
            f"num_prompts: calibration needs at least {MIN_SEQUENCES} answered prompts, got {len(examples)}"
        )
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    splits: Splits = {}
    start = 0
    for name, share in SPLITS:
        stop = len(shuffled) if name == SPLITS[-1][0] else start + max(1, round(share * len(shuffled)))
        splits[name] = shuffled[start:stop]
        start = stop
    return splits


def leading(examples: Sequence[Example], max_rows: int) -> list[Example]:
    """The first examples, as many as it takes to have ``max_rows`` judged rows; all of them if that is fewer."""
    taken: list[Example] = []
    num_rows = 0
    for example in examples:
        if num_rows >= max_rows:
            break
        taken.append(example)
        num_rows += len(example.token_ids) - example.first_judged
    return taken
