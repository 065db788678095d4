"""The parts of a sweep: samples and sums that merge, files that phases leave, settings, and where tasks may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tide_ray import UserError
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.reservoir import Reservoir, hashed
from tide_ray.calibrate.ridge import Sums
from tide_ray.calibrate.statistics import FitStatistics, FitSums
from tide_ray.calibrate.sweep_config import Resources, SweepConfig, unique_names
from tide_ray.calibrate.sweep_folder import MAX_SHARDS, PHASES, ModelFolder, shards
from tide_ray.calibrate.sweep_nodes import fitting_gpus, has_room
from tide_ray.cli import app

SETTINGS: dict[str, dict[str, Any]] = {"answers": {"max_tokens": 8}, "fit": {"seed": 0}, "routers": {"rank": None}}

# ---- samples and sums ----


def test_a_reservoir_depends_on_keys_and_seed_not_on_order_or_on_who_saw_the_rows() -> None:
    keys = np.arange(500)
    whole = Reservoir(40, seed=3)
    whole.add(keys, number=torch.from_numpy(keys))
    backwards = Reservoir(40, seed=3)
    for part in np.array_split(keys[::-1].copy(), 7):
        backwards.add(part, number=torch.from_numpy(part))
    merged, other = Reservoir(40, seed=3), Reservoir(40, seed=3)
    merged.add(keys[1::3], number=torch.from_numpy(keys[1::3].copy()))
    rest = np.setdiff1d(keys, keys[1::3])
    other.add(rest, number=torch.from_numpy(rest))
    merged.merge(other)
    assert torch.equal(backwards.take("number"), whole.take("number"))
    assert torch.equal(merged.take("number"), whole.take("number"))
    assert merged.num_rows == 40
    another = Reservoir(40, seed=4)
    another.add(keys, number=torch.from_numpy(keys))
    assert len(np.intersect1d(another.take("number"), whole.take("number"))) < 20


def test_keys_hash_to_distinct_and_even_numbers() -> None:
    keys = (np.arange(64)[:, None] << 32 | np.arange(256)).ravel()
    hashes = hashed(keys, seed=0)
    assert len(np.unique(hashes)) == len(keys)
    assert np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16).std() < 0.1 * len(keys) / 16
    assert hashed(keys[5:6], 0)[0] == hashes[5]


def no_statistics() -> FitStatistics:
    train, held = (FitSums({2: Sums.zeros(4, 4)}, {2: Sums.zeros(4, 6)}, Reservoir(16, seed=0)) for _ in range(2))
    return FitStatistics(train=train, held=held)


def statistics(rows: range, *, held: bool = False) -> FitStatistics:
    """Of rows that are a function of their numbers."""
    made = no_statistics()
    x = torch.stack([torch.sin(torch.arange(4) + float(number)) for number in rows])
    sums = made.held if held else made.train
    sums.heads[2].add(x, x**2)
    sums.kv[2].add(x, torch.cat((x, x[:, :2]), dim=1))
    sums.reservoir.add(np.array(rows), final=x, state_2=x.half())
    return made


def test_statistics_of_parts_merge_and_survive_a_file(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, tmp_path)
    for first, rows in ((0, range(30)), (1, range(30, 45))):
        folder.write_sums(first, statistics(rows).tensors(), [first], 1.5)
    folder.write_sums(2, statistics(range(45, 50), held=True).tensors(), [2], 0.5)
    assert folder.fitted_shards() == {0, 1, 2}
    assert folder.sums_of(1) == ([1], 1.5)
    merged = no_statistics()
    for first in folder.sums_files():
        part = no_statistics()
        part.restore(folder.read_sums(first))
        merged.merge(part)
    whole = statistics(range(45))
    torch.testing.assert_close(merged.train.heads[2].gram, whole.train.heads[2].gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.train.kv[2].cross, whole.train.kv[2].cross, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.train.reservoir.take("state_2"), whole.train.reservoir.take("state_2"))
    assert (merged.train.num_rows, merged.held.num_rows) == (45, 5)


# ---- files ----


@pytest.mark.parametrize("num_items", [0, 1, 16, 31, 32, 64, 100, 1000])
def test_shards_are_even_and_depend_on_the_number_of_items_alone(num_items: int) -> None:
    parts = shards(num_items)
    assert [item for part in parts for item in part] == list(range(num_items))
    assert 1 <= len(parts) <= MAX_SHARDS
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == 1 or min(sizes) >= 16


def filled(tmp_path: Path) -> ModelFolder:
    """A folder that every phase has left its files in."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder = ModelFolder(tmp_path / "model", scratch)
    assert folder.adopt(SETTINGS) == ""
    folder.write_answers(1, {16: Example([5, 6, 7], 1)}, 0.5)
    folder.write_answers(0, {3: Example([1], 0), 1: Example([2, 3], 0)}, 1.0)
    folder.write_sums(0, statistics(range(5)).tensors(), [0], 1.0)
    folder.write_done({"routers": "abc"})
    return folder


def test_answers_come_back_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    examples, seconds = filled(tmp_path).answers()
    assert examples == [Example([2, 3], 0), Example([1], 0), Example([5, 6, 7], 1)]
    assert seconds == 1.5


@pytest.mark.parametrize("phase", PHASES)
def test_a_changed_setting_starts_again_with_its_phase_and_says_what_it_was(tmp_path: Path, phase: str) -> None:
    folder = filled(tmp_path)
    assert folder.adopt(SETTINGS) == ""
    assert folder.done() is not None
    ((name, value),) = SETTINGS[phase].items()
    said = folder.adopt({**SETTINGS, phase: {name: 4}})
    assert said == f"starts again with the phase {phase}: {name} was {value!r}, now 4"
    assert folder.done() is None
    assert bool(folder.fitted_shards()) == (phase == "routers")
    assert bool(folder.answered_shards()) == (phase != "answers")
    assert folder.adopt({**SETTINGS, phase: {name: 4}}) == ""


def test_a_writer_of_an_attempt_that_is_over_changes_nothing(tmp_path: Path) -> None:
    """A killed driver's worker may live on, and add up shards that the next attempt gave to another worker."""
    folder = filled(tmp_path)
    folder.scratch.rmdir()
    with pytest.raises(Exception, match="No such file"):
        folder.write_sums(0, statistics(range(9)).tensors(), [0, 1], 1.0)
    assert folder.fitted_shards() == {0}


def test_statistics_that_overlap_or_are_damaged_are_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    folder.write_sums(1, statistics(range(5)).tensors(), [1, 0], 1.0)
    with pytest.raises(UserError, match=r"statistics in .* overlap"):
        folder.fitted_shards()
    (folder.path / "sums-01.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"sums-01.safetensors' is damaged"):
        folder.fitted_shards()


# ---- settings ----


def test_models_take_common_settings_and_their_own_win() -> None:
    config = SweepConfig.build(
        {
            "models": ["org/One", {"model": "/models/two/", "seed": 7, "workers": 2, "labels": {"zone": "!a"}}],
            "output": "out",
            "max_tokens": 32,
            "seed": 3,
            "num_cpus": 0.5,
            "max_parallel": 2,
        }
    )
    one, two = config.models
    assert (one.name, two.name) == ("One", "two")
    assert (one.calibration.seed, two.calibration.seed) == (3, 7)
    assert (one.calibration.max_tokens, two.calibration.output) == (32, "out/two")
    assert (one.resources.workers, two.resources.workers) == (1, 2)
    assert two.resources.options(0.0) == {"num_cpus": 0.5, "num_gpus": 0.0, "label_selector": {"zone": "!a"}}
    assert config.max_parallel == 2


def test_names_are_unique_and_safe_as_folders() -> None:
    models = ["demo", "org/Demo", "a/../..", "/x/My Model!/", "weights.gguf", "demo", "sweep.json", "_work"]
    assert unique_names(models) == [
        "demo", "Demo-2", "model", "My-Model", "weights.gguf", "demo-3", "sweep.json-2", "work",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": []}, r"models must be a list of models, got \[\]"),
        ({"models": "demo"}, "models must be a list of models, got 'demo'"),
        ({"models": ["demo", 3]}, r"models\[1\] must be a model, or a mapping with the field model, got 3"),
        ({"models": [{"seed": 1}]}, r"models\[0\] must be a model, .* got \{'seed': 1\}"),
        ({"models": ["demo"], "model": "demo"}, "model: the sweep has a list of models, got 'demo' beside it"),
        ({"models": [{"model": "demo", "output": "x"}]}, r"models\[0\]: unknown field 'output'; known: name, model"),
        ({"models": ["demo"], "max_paralel": 1}, "config: unknown field 'max_paralel'; known: models, output"),
        ({"models": ["demo"], "max_parallel": 0}, "max_parallel: .*got 0"),
        ({"models": ["demo", {"model": "x", "workers": 9}]}, r"models\[1\]: workers: .*got 9"),
        ({"models": [{"model": "x", "num_gpus": "two"}]}, r"models\[0\]: num_gpus: .*got 'two'"),
        ({"models": [{"model": "x", "kv_policy": "zero"}]}, r"models\[0\]: kv_policy: .*got 'zero'"),
        (
            {"models": [{"model": "x", "labels": {"a": "b c"}}]},
            r"models\[0\]: labels: .*got 'a': 'b c'",
        ),
        ({"models": ["demo"], "output": "s3://b"}, "output must be a folder that every node can see, got 's3://b'"),
    ],
)
def test_bad_settings_are_refused_by_entry_field_and_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SweepConfig.build(values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "models[0]: workers: input should be greater than or equal to 1, got 0"),
        (["--model", "a", "--model", "b", "--num-prompts", "3"], "models[0]: num_prompts: "),
        (["--max-parallel", "0"], "max_parallel: input should be greater than or equal to 1, got 0"),
        (["--labels", "zone"], "labels must be NAME=VALUE separated by commas, got 'zone'"),
        (["--model", "demo", "--model", "demo", "--prompts", "no.jsonl"], "prompts: file not found: 'no.jsonl'"),
        (["--model", "demo", "--workers", "2", "--address", "127.0.0.1:1"], "address: nobody answers at"),
        (
            ["--model", "demo", "--model", "demo", "--output", "~nobody-of-that-name/x"],
            "output: no such home, got '~nobody-of-that-name/x'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--output", str(tmp_path / "out"), *flags])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_folder_with_something_else_is_not_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    result = CliRunner().invoke(app, ["calibrate", "--workers", "2", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds other files (thesis.tex) and no sweep" in result.stderr


# ---- where tasks run ----


def test_what_no_node_has_is_refused_at_once() -> None:
    nodes = [
        {"Resources": {"CPU": 4.0, "memory": 2.0**33}, "Labels": {"zone": "a"}},
        {"Resources": {"CPU": 8.0, "GPU": 1.0}, "Labels": {}},
    ]
    assert fitting_gpus(0, Resources(), "auto", nodes) == 1
    assert fitting_gpus(0, Resources(memory=8, labels={"zone": "a"}), "cpu", nodes) == 0
    with pytest.raises(UserError, match=r"models\[3\]: labels: no node has them, got \{'zone': 'b'\}"):
        fitting_gpus(3, Resources(labels={"zone": "b"}), "cpu", nodes)
    with pytest.raises(UserError, match=r"models\[0\]: no node has room .* got num_cpus 1, num_gpus 1, memory 8"):
        fitting_gpus(0, Resources(memory=8), "auto", nodes)


def room(num_cpus: float, running: list[float], **changes: Any) -> bool:
    cluster = {"max_parallel": None, "max_cpus": None, "num_nodes": 2, "total_cpus": 8.0, "free_cpus": 8.0}
    return has_room(num_cpus, running, **{**cluster, **changes})


def test_a_sweep_leaves_a_cluster_that_others_use_a_free_cpu_per_node() -> None:
    assert room(1, [1, 1], free_cpus=3)
    assert not room(1, [1, 1], free_cpus=2), "a generation job reads and writes with these"
    assert room(1, [], num_nodes=1, total_cpus=1, free_cpus=1), "where there is only one it may be taken"
    assert not room(1, [], num_nodes=1, total_cpus=1, free_cpus=0)
    assert room(1, [1] * 8, num_nodes=0, free_cpus=0), "Ray queues what its own cluster cannot run yet"
    assert not room(1, [0, 0], max_parallel=2)
    assert not room(2, [1, 1], max_cpus=3)
    assert room(1, [1, 1], max_cpus=3, free_cpus=0)
    assert room(4, [], max_cpus=3)
