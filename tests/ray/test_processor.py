"""build_processor in the way ray.data.llm is used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from tide_ray import TideProcessorConfig, build_processor
from tide_ray.config import EngineConfig
from tide_ray.data.pacing import Pacing
from tide_ray.data.processor import concurrent_batches
from tide_ray.data.result_rows import RESULT_SCHEMA
from tide_ray.data.schema import ERROR_COLUMN
from tide_ray.engine.engine import TideEngine
from tide_ray.types import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]

ENGINE = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "max_model_len": 128, "num_threads": 1}


def make_config(model: Path, **settings: Any) -> TideProcessorConfig:
    return TideProcessorConfig(
        **{"model_source": str(model), "engine_kwargs": ENGINE, "batch_size": 4, "num_cpus_per_actor": 0, **settings}
    )


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["question"]}],
        "sampling_params": {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "detokenize": False},
    }


def test_preprocess_and_postprocess_work_as_in_ray_data_llm(tiny_llama_folder: Path) -> None:
    dataset = ray.data.from_items([{"question": f"why {i}?", "number": i} for i in range(10)])
    processor = build_processor(
        make_config(tiny_llama_folder),
        preprocess=ask,
        postprocess=lambda row: {"number": row["number"], "answer": row["generated_text"], "prompt": row["prompt"]},
        preprocess_map_kwargs={"num_cpus": 0.5},
        postprocess_map_kwargs={"num_cpus": 0.25},
    )
    rows = sorted(processor(dataset).take_all(), key=lambda row: row["number"])
    assert [set(row) for row in rows] == [{"number", "answer", "prompt"}] * 10
    engine = TideEngine.from_pretrained(str(tiny_llama_folder), EngineConfig(**ENGINE))
    for row in rows:
        asked = ask({"question": f"why {row['number']}?", "number": 0})
        expected = engine.generate(asked["messages"], SamplingParams.from_mapping(asked["sampling_params"]))[0]
        assert row["answer"] == expected.outputs[0].text
        assert row["prompt"] == expected.prompt


class CountedLooks(Pacing):
    """Pacing that says how often the driver has looked."""

    number = 0

    def on_execution_step(self, executor: Any) -> None:
        type(self).number += 1
        super().on_execution_step(executor)


def answer_slowly(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(5)
    return row


def test_the_driver_looks_seldom_while_answers_take_their_time(tiny_llama_folder: Path) -> None:
    """Ray looks ten times a second, and each look stops what an engine on that machine computes."""
    dataset = ray.data.from_items([{"prompt": "ab"}], override_num_blocks=1)
    processor = build_processor(make_config(tiny_llama_folder))
    assert processor(processor(dataset)).context.custom_execution_callback_classes == [Pacing]
    slow = ray.data.from_items([{"prompt": "ab"}], override_num_blocks=1).map(answer_slowly)
    slow.context.custom_execution_callback_classes = [CountedLooks]
    assert slow.take_all() == [{"prompt": "ab"}]
    assert 5 < CountedLooks.number < 25


def test_rows_have_the_contract_columns_and_strings_are_not_wrapped(tiny_llama_folder: Path) -> None:
    params = {"max_tokens": 3, "ignore_eos": True, "temperature": 0.0}
    items = [{"prompt": "ab", "sampling_params": params, "tag": i} for i in range(3)]
    rows = build_processor(make_config(tiny_llama_folder))(ray.data.from_items(items)).take_all()
    engine = TideEngine.from_pretrained(str(tiny_llama_folder), EngineConfig(**ENGINE))
    for row in rows:
        assert set(row) == {*RESULT_SCHEMA.names, "sampling_params", "tag"}
        assert row["prompt"] == "ab"
        assert list(row["prompt_token_ids"]) == engine.tokenizer("ab")["input_ids"]
        assert row["num_generated_tokens"] == len(row["exit_layers"]) == len(row["token_times_us"]) == 3
        assert row[ERROR_COLUMN] == ""
        assert row["time_taken_llm"] > 0
    assert len({row["batch_uuid"] for row in rows}) == 1


def test_a_rejected_row_stays_whole_or_raises(tiny_llama_folder: Path) -> None:
    items = [{"prompt": "ok", "sampling_params": {"max_tokens": 2}}, {"prompt": "long " * 50, "sampling_params": {}}]
    dataset = ray.data.from_items(items)
    config = make_config(tiny_llama_folder, should_continue_on_error=True)
    answered = build_processor(config, postprocess=lambda row: {"first": row["generated_text"][0]})(dataset)
    good, bad = sorted(answered.take_all(), key=lambda row: row[ERROR_COLUMN])
    assert good[ERROR_COLUMN] == ""
    assert len(good["first"]) == 1
    assert "prompt must have at most 127 tokens" in bad[ERROR_COLUMN]
    assert bad["prompt"] == "long " * 50
    again = build_processor(config, preprocess=lambda row: {"prompt": row["first"] + "?"})(answered)
    errors = {row["prompt"]: row[ERROR_COLUMN] for row in again.take_all()}
    assert errors == {good["first"] + "?": "", bad["prompt"]: bad[ERROR_COLUMN]}, "a later step leaves it alone"
    with pytest.raises(ray.exceptions.RayTaskError, match="prompt must have at most 127 tokens"):
        build_processor(make_config(tiny_llama_folder))(dataset).take_all()


def test_an_engine_always_has_more_rows_at_hand_than_it_can_hold() -> None:
    for batch_size in (1, 4, 32, 100):
        for max_num_seqs in (8, 64, 256):
            rows = batch_size * concurrent_batches(batch_size, max_num_seqs)
            assert rows >= 2 * max_num_seqs or concurrent_batches(batch_size, max_num_seqs) == 128


def test_few_rows_reach_every_actor_and_a_pool_that_grows_keeps_its_engines_full() -> None:
    def batches(num_rows: int, num_actors: int, max_actors: int) -> int:
        return concurrent_batches(4, 8, num_rows=num_rows, num_actors=num_actors, max_actors=max_actors)

    assert concurrent_batches(4, 8) == 8
    assert batches(10_000, 1, 4) == 8
    assert batches(16, 4, 4) == 1, "one for each"
    assert batches(30, 1, 2) == 4, "half for the one that may come"
    assert batches(16, 1, 4) == 2, "but not fewer than fill the residents"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": {"zone": "a b"}}, "labels: expected NAME: VALUE"),
        ({"engine_kwargs": {"dtyp": "float32"}}, "unknown field 'dtyp'"),
        ({"engine_kwargs": {"dtype": "int3"}}, "dtype must be one of"),
        ({"concurrency": 0}, "concurrency must be a positive number"),
        ({"concurrency": (3, 2)}, "concurrency must be a positive number"),
        ({"batchsize": 3}, "batchsize"),
    ],
)
def test_a_bad_config_is_refused_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TideProcessorConfig(**{"model_source": "demo", **settings})
