"""The output folder: what it is bound to, what is committed, what is done again, when it is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job_helpers import all_ids, result_rows, start, write_prompts
from tide_ray.data.parts import make_error_table, write_part
from tide_ray.types import JobError, UserError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


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


def test_rows_with_the_longest_answers_come_first_where_lengths_are_known(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i}", "n": {n}}}\n' for i, n in enumerate(["3", "9", "null", "3", "5"])))
    folder, _ = start(tmp_path / "out", prompts, length_column="n")
    ids = all_ids(folder)
    given, _ = folder.write_todo(folder.committed())
    assert pq.read_table(given)["row_id"].to_pylist() == ids
    folder.clear_uncommitted()
    again, _ = start(tmp_path / "out", prompts, length_column="n")
    todo, num_left = again.write_todo(again.committed(), sorts_by_length=True)
    assert num_left == 5
    assert pq.read_table(todo)["row_id"].to_pylist() == [ids[2], ids[1], ids[4], ids[0], ids[3]]


def test_a_finished_job_says_so(tmp_path: Path, prompts: Path) -> None:
    folder, snapshot = start(tmp_path / "out", prompts)
    ids = all_ids(folder)
    folder.write_bad_rows(folder.committed(), {})
    write_part(folder.scratch, folder.path / "data" / "part-x.parquet", [result_rows(ids[:5])], {})
    counts = folder.check_complete(snapshot, folder.committed())
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
        folder.check_complete(snapshot, folder.committed())
    write_part(folder.scratch, folder.path / "data" / "part-y.parquet", [result_rows([ids[0], ids[4]])], {})
    with pytest.raises(JobError, match="holds 6 rows with 5 ids of 6 prompts"):
        folder.check_complete(snapshot, folder.committed())


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


def test_rejected_rows_can_be_done_again_and_count_their_attempts(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    folder, snapshot = start(tmp_path / "out", prompts)
    ids = all_ids(folder)
    folder.write_bad_rows(folder.committed(), {})
    write_part(folder.scratch, folder.path / "data" / "part-x.parquet", [result_rows(ids[:4])], {})
    rejected = make_error_table(*(pa.chunked_array([[text]]) for text in (ids[4], "no memory", "4")))
    write_part(folder.scratch, folder.path / "errors" / "part-x.parquet", [rejected], {})
    folder.finish({}, folder.check_complete(snapshot, folder.committed()))
    folder.clear_uncommitted()

    for past in (1, 2):
        again, _ = start(tmp_path / "out", prompts)
        assert again.take_back_errors() == 2
        assert again.finished() is None
        committed = again.committed()
        again.write_bad_rows(committed, {})
        assert committed.errors == {ids[5]}, "a line that is no JSON stays one"
        todo, num_left = again.write_todo(committed)
        assert num_left == 1
        assert pq.read_table(todo).select(["row_id", "attempts"]).to_pylist() == [{"row_id": ids[4], "attempts": past}]
        rejected = rejected.set_column(3, "attempts", pa.array([past + 1], pa.int32()))
        write_part(again.scratch, again.path / "errors" / "part-x.parquet", [rejected], {})
        again.clear_uncommitted()
    assert start(tmp_path / "out", prompts)[0].committed().num_rows == 6
