"""What every contender is asked: prompts from files, interleaved, as token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tide_ray.data
from tide_ray import SamplingParams, UserError
from tide_ray.engine.preparation import position_limit
from tide_ray.engine.requests import PromptEncoder
from tide_ray.models import LoadedModel
from tide_ray.types import Prompt

DEMO_PROMPTS = Path(tide_ray.data.__file__).parent / "demo_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Workload:
    """The same greedy questions for every contender."""

    model: str
    dtype: str
    max_tokens: int
    sources: list[str]
    texts: list[str]

    @classmethod
    def read(cls, sources: list[str], *, model: str, dtype: str, max_tokens: int, limit: int | None = None) -> Workload:
        """Read ``FILE`` or ``FILE:N`` JSONL sources, interleave them in proportion to their sizes, keep ``limit``.

        Raises:
            UserError: a file that cannot be read, or has fewer rows than asked for.
        """
        named = sources or [str(DEMO_PROMPTS)]
        columns = [_read_source(source) for source in named]
        placed = [((i + 0.5) / len(texts), text) for texts in columns for i, text in enumerate(texts)]
        texts = [text for _, text in sorted(placed, key=lambda item: item[0])]
        return cls(model, dtype, max_tokens, [Path(source).name for source in named], texts[:limit])

    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.max_tokens)

    def prompts(self, tokenizer: Any) -> list[Prompt]:
        """The texts as the job asks them: one user message each when the tokenizer has a chat template."""
        if getattr(tokenizer, "chat_template", None):
            return [[{"role": "user", "content": text}] for text in self.texts]
        return list(self.texts)

    def token_ids(self, loaded: LoadedModel) -> list[list[int]]:
        """Every prompt's token ids.

        Raises:
            UserError: a prompt that the model cannot be asked, or that leaves no room for ``max_tokens``.
        """
        config = loaded.model.config.get_text_config()
        encoder = PromptEncoder(loaded.tokenizer, config.vocab_size)
        ids = [encoder.encode(prompt)[1] for prompt in self.prompts(loaded.tokenizer)]
        needed, limit = max(map(len, ids)) + self.max_tokens, position_limit(config)
        if needed > limit:
            raise UserError(f"max_tokens: the longest prompt needs {needed} positions, the model has {limit}")
        return ids


def few_shot_texts(path: str, shots: int, count: int, *, is_shared: bool = False, skip: int = 0) -> list[str]:
    """Questions of a JSONL file with prompt and answer, each after ``shots`` solved ones.

    Args:
        is_shared: the solved ones are the same for all questions; otherwise each question has its own.
        skip: rows at the start that are left to others.

    Raises:
        UserError: the file has too few rows, or rows without the two columns.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = rows[skip:]
        solved = [f"Question: {row['prompt']}\nAnswer: {row['answer']}" for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"few_shot needs JSONL with prompt and answer, got {path!r} ({error})") from None
    if count * (shots + 1) > len(rows):
        after = f" after the first {skip}" if skip else ""
        raise UserError(f"limit: {path!r} has {len(rows)} rows{after}, {count} prompts of {shots} shots need more")
    firsts = [count + (0 if is_shared else n * shots) for n in range(count)]
    return [
        "\n\n".join([*solved[first : first + shots], f"Question: {rows[n]['prompt']}\nAnswer:"])
        for n, first in enumerate(firsts)
    ]


def _read_source(source: str) -> list[str]:
    path, _, count = source.rpartition(":")
    if not count.isdigit() or Path(source).is_file():
        path, count = source, ""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"prompts must be JSONL with a prompt column, got {path!r} ({reason})") from None
    num_wanted = int(count) if count else len(texts)
    if not 1 <= num_wanted <= len(texts):
        raise UserError(f"prompts: {path!r} has {len(texts)} rows, got {source!r}")
    if not all(isinstance(text, str) and text for text in texts[:num_wanted]):
        raise UserError(f"prompts must be non-empty strings, got others in {path!r}")
    return texts[:num_wanted]
