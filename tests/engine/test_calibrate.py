"""Calibration end to end on a tiny model whose deep layers do little, so that there is something to find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from references import tokens
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.exits.checkpoint import Routers
from tiny_models import TOKENIZER_VOCAB_SIZE, save_shallow_model

NUM_PROMPTS = 48


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shallow_model(tmp_path_factory.mktemp("shallow"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, TOKENIZER_VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(NUM_PROMPTS)]
    file.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in rows))
    return file


def settings(model_folder: Path, output: Path, **changes: object) -> CalibrationConfig:
    values = {"model": str(model_folder), "output": str(output), "dtype": "float32", "max_tokens": 24, "bottleneck": 16}
    return CalibrationConfig.build({**values, **changes})


@pytest.fixture(scope="module")
def checkpoint(model_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "routers"
    calibrate(settings(model_folder, output, prompts=[str(prompts)], boundaries=[1, 2]))
    return output


def test_the_checkpoint_says_what_it_was_made_from_and_how_good_it_is(checkpoint: Path) -> None:
    facts = Routers.load(checkpoint).facts
    assert facts.training["source"] == "own answers"
    assert sum(facts.training["prompts"].values()) == NUM_PROMPTS
    shallow, deep = facts.metrics["candidates"]
    assert (shallow["depth"], deep["depth"]) == (1, 2)
    assert deep["head_agreement"] > max(0.9, shallow["head_agreement"])
    assert deep["exits"]["0.05"]["share"] > 0.5
    assert facts.metrics["fit"]["2"]["kv_error"] < facts.metrics["fit"]["1"]["kv_error"]
    assert sum(count for _, _, count in deep["reliability"]) == facts.metrics["rows"]["test"]
    assert deep["coverage"]["by_gate"][-1] == deep["head_agreement"], "all tokens leave at full coverage"
    profile = facts.metrics["profile"]
    assert profile["depth"] == [1, 2, 3]
    assert profile["lens_agreement"][2] > max(0.9, profile["lens_agreement"][0])


def test_the_checkpoint_says_what_each_kv_policy_costs(checkpoint: Path) -> None:
    policies = {row["kv_policy"]: row for row in Routers.load(checkpoint).facts.metrics["kv_policies"]}
    assert policies.keys() == {"deferred", "fitted", "copy"}
    assert all(row["exit_share"] > 0.2 for row in policies.values())
    assert policies["deferred"]["others"] == [0.0, 0.0, 0.0], "K/V are exact, so what runs every layer is full depth's"
    assert policies["copy"]["disagreement"][0] >= policies["deferred"]["disagreement"][0] > 0


def test_an_engine_with_the_checkpoint_skips_layers_and_answers_as_full_depth_mostly_does(
    model_folder: Path, checkpoint: Path
) -> None:
    config = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8}
    generator = torch.Generator().manual_seed(9)
    new = [torch.randint(6, TOKENIZER_VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(16)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    full = TideEngine.from_pretrained(str(model_folder), EngineConfig(**config))
    exiting = TideEngine.from_pretrained(
        str(model_folder), EngineConfig(**config, exits=str(checkpoint), exit_error=0.05, exits_when="always")
    )
    expected, outputs = tokens(full.generate(new, params)), exiting.generate(new, params)
    depths = [depth for output in outputs for depth in output.outputs[0].exit_layers]
    assert sum(depth < 4 for depth in depths) > 0.3 * len(depths)
    assert exiting.stats.rows_through_layer[3] < full.stats.rows_through_layer[3]
    same = [
        a == b
        for ours, theirs in zip(tokens(outputs), expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert sum(same) > 0.6 * len(same)
    assert all(len(o.outputs[0].gate_scores) == len(o.outputs[0].exit_layers) for o in outputs)
    assert exiting.describe()["exits"]["routers"] == Routers.load(checkpoint).identity


def test_the_same_seed_gives_the_same_checkpoint(
    model_folder: Path, prompts: Path, checkpoint: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    calibrate(settings(model_folder, again, prompts=[str(prompts)], boundaries=[1, 2]))
    first, second = Routers.load(checkpoint), Routers.load(again)
    for one, other in zip(first.boundaries, second.boundaries, strict=True):
        assert one.thresholds == pytest.approx(other.thresholds, abs=1e-3)


def test_text_is_calibrated_on_as_it_is(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"paragraph {n} of a text that says little more than that" for n in range(40)))
    calibrate(settings(model_folder, tmp_path / "routers", text=str(text), num_prompts=32, boundaries=[2], rank=8))
    routers = Routers.load(tmp_path / "routers")
    assert routers.facts.training["source"] == "text"
    assert routers.boundaries[0].head.rank == 8


def test_what_cannot_be_calibrated_on_is_refused(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    def error(**changes: object) -> str:
        with pytest.raises(UserError) as caught:
            calibrate(settings(model_folder, tmp_path / "routers", **changes))
        assert not (tmp_path / "routers").exists()
        return str(caught.value)

    assert "num_prompts: the sources have 48 usable prompts, got 99" in error(prompts=[str(prompts)], num_prompts=99)
    assert "boundaries must be from 1 to 3, got 4" in error(prompts=[str(prompts)], boundaries=[4])
    assert "text must be a UTF-8 text file" in error(text=str(tmp_path / "none.txt"))
