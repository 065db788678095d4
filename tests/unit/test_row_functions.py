"""What a pipeline's own functions make of rows, as in ray.data.llm."""

from __future__ import annotations

from typing import Any

import pytest

from tide_ray.data.row_functions import RowFunction, unless_rejected, with_request
from tide_ray.data.schema import ERROR_COLUMN


def test_columns_that_preprocess_does_not_name_are_carried_over() -> None:
    add = with_request(lambda row: {"prompt": f"{row['id']} ** 3 = ?", "id": str(row["id"])})
    assert add({"id": 3, "tag": "a"}) == {"id": "3", "tag": "a", "prompt": "3 ** 3 = ?"}


def set_in_place(row: dict[str, Any]) -> dict[str, Any]:
    row["prompt"] = "b"
    return row


@pytest.mark.parametrize("preprocess", [lambda row: {"prompt": "b"}, lambda row: {**row, "prompt": "b"}, set_in_place])
def test_a_prompt_takes_the_place_of_all_that_the_row_had(preprocess: RowFunction) -> None:
    """Rows of an earlier step have ``prompt_token_ids``, which would go before, and were answered once more."""
    row = {"prompt": "a", "prompt_token_ids": [1], "messages": None, "tag": "a"}
    assert with_request(preprocess)(dict(row)) == {"tag": "a", "prompt": "b"}
    assert with_request(lambda row: {"prompt": row["prompt"]})(row) == {"tag": "a", "prompt": "a"}
    assert with_request(lambda row: {"extra": 1})(row) == {**row, "extra": 1}
    assert with_request(lambda row: {**row, "extra": 1})(row) == {**row, "extra": 1}


def test_a_row_that_an_earlier_step_rejected_is_asked_for_nothing() -> None:
    rejected = {"answer": None, ERROR_COLUMN: "prompt too long"}
    assert with_request(lambda row: {"prompt": row["answer"].upper()})(rejected) == rejected


def test_rejected_rows_pass_postprocess_by() -> None:
    finish = unless_rejected(lambda row: {"answer": row["generated_text"][0]}, adds_error=True)
    rejected = {"generated_text": "", ERROR_COLUMN: "prompt too long"}
    assert finish(rejected) == rejected
    assert finish({"generated_text": "yes", ERROR_COLUMN: ""}) == {"answer": "y", ERROR_COLUMN: ""}
    alone = unless_rejected(lambda row: {"answer": row["generated_text"]}, adds_error=False)
    assert alone({"generated_text": "yes", ERROR_COLUMN: ""}) == {"answer": "yes"}
