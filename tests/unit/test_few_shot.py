"""Few-shot prompts for calibrating, apart from those that are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from programs import benchmarked


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(20)))
    return path


def run(*arguments: object) -> Result:
    return benchmarked("few-shot", *arguments)


def test_every_question_has_solved_ones_of_its_own_and_skipped_rows_are_in_no_prompt(source: Path) -> None:
    done = run(source, "--shots", 2, "--limit", 3, "--skip", 9)
    assert done.exit_code == 0, done.stderr
    prompts = [json.loads(line)["prompt"] for line in done.stdout.splitlines()]
    assert prompts[0] == "Question: q12\nAnswer: a12\n\nQuestion: q13\nAnswer: a13\n\nQuestion: q9\nAnswer:"
    used = [word for prompt in prompts for word in prompt.split() if word.startswith("q")]
    assert len(used) == len(set(used)) == 9
    assert {int(word[1:]) for word in used} == set(range(9, 18))


def test_the_file_holds_what_would_be_printed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "few.jsonl"
    assert run(source, "--shots", 1, "--limit", 2, "--output", out).stdout == ""
    assert out.read_text() == run(source, "--shots", 1, "--limit", 2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shots", 2, "--limit", 5, "--skip", 9), "has 11 rows after the first 9, 5 prompts of 2 shots need more"),
        (("--limit", 1, "--output", "."), "output cannot be written, got '.'"),
        (("--shots", 0), "shots must be at least 1, got 0"),
        (("--skip", -1), "skip must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_made_is_refused(source: Path, arguments: tuple[object, ...], message: str) -> None:
    done = run(source, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
