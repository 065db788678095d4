"""The output folder: who owns it, what it is bound to, what is committed, when it is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.job_folder import JobError, JobFolder
from tide_ray.data.lock import LOCK_FILE, locked
from tide_ray.data.parts import write_part
from tide_ray.data.run_facts import job_fields
from tide_ray.data.schema import OUTPUT_SCHEMA
from tide_ray.data.snapshot import Snapshot, read_rows, write_snapshot
from tide_ray.types import UserError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(5)) + "not json\n")
    return path


def start(output: Path, prompts: Path, **settings: Any) -> tuple[JobFolder, Snapshot]:
    """What every attempt does before it generates."""
    config = GenerateJobConfig.build({"prompts": [str(prompts)], "output": str(output), **settings})
    folder = JobFolder(output)
    folder.create()
    folder.begin()
    snapshot = write_snapshot(config, folder.new_input_folder)
    folder.adopt(job_fields(config, "model-digest", snapshot))
    return folder, snapshot


def result_rows(ids: list[str]) -> pa.Table:
    filled: dict[str, Any] = {"exit_layers": [3, 1], "num_generated_tokens": 2, "mean_exit_layer": 2.0}
    return pa.Table.from_pylist([{"row_id": row_id, **filled} for row_id in ids], schema=OUTPUT_SCHEMA)


def all_ids(folder: JobFolder) -> list[str]:
    return [row_id for table in read_rows(folder.input_folder) for row_id in table["row_id"].to_pylist()]


def test_a_second_attempt_has_only_the_uncommitted_rows_to_do(tmp_path: Path, prompts: Path) -> None:
    folder, snapshot = start(tmp_path / "out", prompts)
    ids = all_ids(folder)
    folder.write_bad_rows(folder.committed(), {})
    assert folder.committed().errors == {ids[5]}
    write_part(folder.scratch, folder.path / "data" / "part-x.parquet", [result_rows(ids[:2])], {})
    folder.clear_uncommitted()

    again, same = start(tmp_path / "out", prompts)
    assert same == snapshot
    assert again.attempt != folder.attempt
    committed = again.committed()
    again.write_bad_rows(committed, {})
    todo, num_left = again.write_todo(committed)
    assert num_left == 3
    assert pq.read_table(todo)["row_id"].to_pylist() == ids[2:5]
    assert len(list((again.path / "errors").iterdir())) == 1


def test_a_finished_job_says_so(tmp_path: Path, prompts: Path) -> None:
    folder, snapshot = start(tmp_path / "out", prompts)
    ids = all_ids(folder)
    folder.write_bad_rows(folder.committed(), {})
    write_part(folder.scratch, folder.path / "data" / "part-x.parquet", [result_rows(ids[:5])], {})
    counts = folder.check_complete(snapshot)
    assert counts == {"rows": 5, "errors": 1, "tokens": 10, "mean_depth": 2.0}
    assert folder.finished() is None
    folder.finish({"device": "cpu"}, counts)
    folder.clear_uncommitted()
    assert start(tmp_path / "out", prompts)[0].finished() == counts
    assert json.loads((folder.path / "run.json").read_text()) == {"device": "cpu"}


def test_missing_and_double_rows_are_noticed(tmp_path: Path, prompts: Path) -> None:
    folder, snapshot = start(tmp_path / "out", prompts)
    ids = all_ids(folder)
    write_part(folder.scratch, folder.path / "data" / "part-x.parquet", [result_rows(ids[:4])], {})
    with pytest.raises(JobError, match="holds 4 rows with 4 ids of 6 prompts"):
        folder.check_complete(snapshot)
    write_part(folder.scratch, folder.path / "data" / "part-y.parquet", [result_rows([ids[0], ids[4]])], {})
    with pytest.raises(JobError, match="holds 6 rows with 5 ids of 6 prompts"):
        folder.check_complete(snapshot)


def test_a_different_job_is_refused_with_both_values(tmp_path: Path, prompts: Path) -> None:
    start(tmp_path / "out", prompts, temperature=0.5)
    with pytest.raises(UserError) as error:
        start(tmp_path / "out", prompts, temperature=0.7, dtype="float32")
    message = str(error.value)
    assert "belongs to a different job" in message
    assert "dtype was 'auto', now 'float32'" in message
    assert "'temperature': 0.5" in message
    assert "'temperature': 0.7" in message
    assert "input_sha256" not in message


def test_changed_prompts_are_a_different_job(tmp_path: Path, prompts: Path) -> None:
    start(tmp_path / "out", prompts)
    prompts.write_text('{"prompt": "something else"}\n')
    with pytest.raises(UserError, match=r"input_sha256 was .*; input_rows was 6, now 1"):
        start(tmp_path / "out", prompts)


def test_where_it_runs_is_not_part_of_the_job(tmp_path: Path, prompts: Path) -> None:
    start(tmp_path / "out", prompts)
    start(tmp_path / "out", prompts, num_actors=4, batch_size=3, device="cpu", max_num_seqs=2, num_threads=1)


def test_a_snapshot_that_was_cut_off_is_written_again(tmp_path: Path, prompts: Path) -> None:
    """A killed driver may leave _input without snapshot.json only if the rename was not atomic; never trust it."""
    (tmp_path / "out" / "_input").mkdir(parents=True)
    (tmp_path / "out" / "_input" / "part-00000.parquet").write_bytes(b"torn")
    folder, _ = start(tmp_path / "out", prompts)
    assert len(all_ids(folder)) == 6


def test_a_folder_with_other_files_is_refused(tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\) and no job"):
        start(tmp_path / "home", prompts)
    with pytest.raises(UserError, match="cannot write"):
        start(tmp_path / "home" / "thesis.txt", prompts)


def test_a_damaged_part_is_named(tmp_path: Path, prompts: Path) -> None:
    folder, _ = start(tmp_path / "out", prompts)
    (folder.path / "data").mkdir()
    (folder.path / "data" / "part-x.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"part-x\.parquet' is damaged"):
        folder.committed()


def test_a_live_owner_keeps_others_out(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from tide_ray.data.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is owned by process {owner.pid} on this host"), locked(tmp_path):
            pass
        owner.kill()
        owner.wait()
        assert (tmp_path / LOCK_FILE).exists()
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK_FILE).exists()
    finally:
        owner.kill()
        owner.communicate()


def test_a_lock_of_another_host_stands(tmp_path: Path) -> None:
    lock = {"pid": 1, "host": "elsewhere", "started": "1", "time": "noon"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(lock))
    with pytest.raises(UserError, match=r"owned by process 1 on host 'elsewhere' since noon; remove"), locked(tmp_path):
        pass


def test_a_process_id_in_use_again_is_not_the_owner(tmp_path: Path) -> None:
    """A container restarts with the host name and process ids of the one that died; its lock must not stand."""
    with locked(tmp_path):
        mine = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps({**mine, "started": "1"}))
    with locked(tmp_path):
        pass
