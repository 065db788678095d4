"""The bundled prompts: what `tide-ray generate` runs when it is given none."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files

LINES = (files("tide_ray.data") / "demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
ROWS = [json.loads(line) for line in LINES]


def test_there_are_64_prompts_numbered_in_order() -> None:
    assert [row["id"] for row in ROWS] == [f"demo-{i:03d}" for i in range(64)]


def test_every_row_has_id_category_and_a_distinct_clean_prompt() -> None:
    assert {tuple(row) for row in ROWS} == {("id", "category", "prompt")}
    prompts = [row["prompt"] for row in ROWS]
    assert all(prompt and prompt == prompt.strip() for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_prompts_vary_in_kind_and_length() -> None:
    kinds = Counter(row["category"] for row in ROWS)
    assert len(kinds) >= 12
    assert max(kinds.values()) <= 10
    lengths = sorted(len(row["prompt"].split()) for row in ROWS)
    assert lengths[0] <= 10
    assert lengths[-1] >= 100
    assert len(set(lengths)) >= 20
