"""Reading prompts: sources, rows, ids and the snapshot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.schema import KEPT_PREFIX
from tide_ray.data.snapshot import read_rows, snapshot_files, write_snapshot
from tide_ray.types import UserError


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def snapshot_rows(tmp_path: Path, *prompts: Path | str, **settings: Any) -> list[dict[str, Any]]:
    config = GenerateJobConfig.build({"prompts": [str(prompt) for prompt in prompts], **settings})
    folder = tmp_path / f"snapshot-{len(list(tmp_path.iterdir()))}"
    snapshot = write_snapshot(config, folder)
    rows = [row for table in read_rows(folder) for row in table.to_pylist()]
    assert len(rows) == snapshot.num_rows
    assert sum(bool(row["error"]) for row in rows) == snapshot.num_bad_rows
    return rows


def snapshot_schema(tmp_path: Path, source: Path, **settings: Any) -> pa.Schema:
    folder = tmp_path / "snapshot"
    write_snapshot(GenerateJobConfig.build({"prompts": [str(source)], **settings}), folder)
    return pq.read_schema(snapshot_files(folder)[0])


def test_every_format_gives_the_same_rows_and_ids(tmp_path: Path) -> None:
    texts = ["plain", 'comma, and "quotes"', "umlaut ü"]
    table = pa.table({"prompt": texts})
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    pq.write_table(table, tmp_path / "b.parquet")
    pa.csv.write_csv(table, tmp_path / "c.csv")
    (tmp_path / "d.txt").write_text("\n\n".join(texts))
    with gzip.open(tmp_path / "e.jsonl.gz", "wb") as stream:
        stream.write(jsonl.read_bytes())
    datasets.Dataset.from_dict({"prompt": texts}).save_to_disk(tmp_path / "f")
    sources = ["a.jsonl", "b.parquet", "c.csv", "d.txt", "e.jsonl.gz", "f"]
    rows = [snapshot_rows(tmp_path, tmp_path / name) for name in sources]
    assert [row["prompt"] for row in rows[0]] == texts
    for name, other in zip(sources, rows, strict=True):
        assert other == rows[0], name


def test_folders_and_globs_read_every_file_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "_hidden").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", [{"prompt": "second"}])
    write_jsonl(folder / "a.jsonl", [{"prompt": "first"}])
    write_jsonl(folder / "_hidden" / "c.jsonl", [{"prompt": "hidden"}])
    (folder / "readme.md").write_text("not prompts")
    for source in (folder, folder / "*.jsonl"):
        assert [row["prompt"] for row in snapshot_rows(tmp_path, source)] == ["first", "second"]


def test_the_bundled_prompts_are_the_default(tmp_path: Path) -> None:
    rows = snapshot_rows(tmp_path)
    assert len(rows) >= 32
    assert not any(row["error"] for row in rows)


def test_a_bad_line_is_an_error_row_with_its_number_and_the_rest_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "good"}\nnot json\n[1]\n\xff\xfe\n\n{"prompt": "also good"}\n')
    rows = snapshot_rows(tmp_path, source)
    assert [row["prompt"] for row in rows if not row["error"]] == ["good", "also good"]
    errors = [row["error"] for row in rows if row["error"]]
    assert errors[0].startswith("line 2 is not JSON")
    assert errors[1:] == ["line 3 is not a JSON object", "line 4 is not UTF-8 text"]
    assert rows[1]["prompt"] == "not json"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None}, "no prompt"),
        ({"prompt": 7}, "prompt must be a string, messages or token ids, got int"),
        ({"prompt": "x", "sampling_params": {"max_token": 3}}, "unknown parameter 'max_token'"),
        ({"prompt": "x", "sampling_params": {"temperature": -1}}, "temperature must be a number from 0 to 100, got -1"),
        ({"prompt": "x", "sampling_params": "{"}, "sampling_params: not JSON"),
        ({"prompt": "x", "sampling_params": [1]}, "sampling_params must be a mapping"),
        ({"prompt": "x", "sampling_params": {"n": 2}}, "n must be 1 in a job, got 2"),
        ({"prompt": "x", "sampling_params": {"logprobs": 1}}, "logprobs are not available in a job"),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": [{"role": "user"}]}, "messages must be a non-empty list"),
        ({"messages": "hello"}, "messages: not JSON"),
        ({"prompt_token_ids": [1, -2]}, "prompt_token_ids must be a non-empty list of token ids"),
        ({"prompt_token_ids": []}, "prompt_token_ids must be a non-empty list of token ids"),
    ],
)
def test_an_unusable_row_says_why(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [row, {"prompt": "good"}])
    bad, good = snapshot_rows(tmp_path, source)
    assert reason in bad["error"]
    assert good["error"] == ""


def test_messages_token_ids_and_params_of_a_row_are_kept(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    source = write_jsonl(
        tmp_path / "in.jsonl",
        [
            {"messages": messages, "sampling_params": {"max_tokens": 5, "stop": ["."]}},
            {"messages": json.dumps(messages)},
            {"prompt_token_ids": [3, 4]},
        ],
    )
    first, second, third = snapshot_rows(tmp_path, source, max_tokens=9)
    assert json.loads(first["messages"]) == json.loads(second["messages"]) == messages
    assert json.loads(first["sampling_params"]) == {"temperature": 0.0, "max_tokens": 5, "stop": ["."]}
    assert json.loads(second["sampling_params"]) == {"temperature": 0.0, "max_tokens": 9}
    assert third["prompt_token_ids"] == [3, 4]


def test_an_empty_message_is_one(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    [row] = snapshot_rows(tmp_path, write_jsonl(tmp_path / "in.jsonl", [{"messages": messages}]))
    assert (row["error"], json.loads(row["messages"])) == ("", messages)


@pytest.mark.parametrize(("name", "start"), [("in.json", "["), ("in.json", "\n ["), ("IN.JSON", "\ufeff[")])
def test_a_json_array_is_not_read_line_by_line(tmp_path: Path, name: str, start: str) -> None:
    """Every line of one was a rejected row, and the job ended well with no answer."""
    source = tmp_path / name
    source.write_text(start + '{"prompt": "a"},\n{"prompt": "b"}]\n', encoding="utf-8")
    with pytest.raises(UserError, match=rf"prompts: .*{name}' is a JSON array, one object per line is needed"):
        snapshot_rows(tmp_path, source)


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize(("content", "reason"), [(b'{"prompt": "a"}', "Not a gzipped file"), (None, "ended before")])
def test_a_broken_gzip_file_is_one_line(tmp_path: Path, suffix: str, content: bytes | None, reason: str) -> None:
    source = tmp_path / f"in{suffix}"
    source.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-20] if content is None else content)
    with pytest.raises(UserError, match=rf"prompts: cannot read '.*{suffix}': .*{reason}"):
        snapshot_rows(tmp_path, source)


def test_nulls_that_arrow_adds_to_structs_are_not_values(tmp_path: Path) -> None:
    """Parquet gives every struct the keys of all rows; a null max_tokens must mean the default, not an error."""
    table = pa.table(
        {
            "messages": [
                [{"role": "user", "content": "a", "name": None}],
                [{"role": "user", "content": "b", "name": "n"}],
            ],
            "sampling_params": [{"max_tokens": 3, "seed": None}, {"max_tokens": None, "seed": 4}],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    first, second = snapshot_rows(tmp_path, tmp_path / "in.parquet", max_tokens=8)
    assert json.loads(first["messages"]) == [{"role": "user", "content": "a"}]
    assert json.loads(first["sampling_params"])["max_tokens"] == 3
    assert json.loads(second["sampling_params"])["max_tokens"] == 8


def test_a_chosen_column_holds_the_prompts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "no", "question": "yes"}])
    assert snapshot_rows(tmp_path, source, prompt_column="question")[0]["prompt"] == "yes"
    (tmp_path / "n.csv").write_text("code\n007\n")
    assert snapshot_rows(tmp_path, tmp_path / "n.csv", prompt_column="code")[0]["prompt"] == "007"


def test_row_ids_depend_on_content_and_ordinal_only(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]
    ids = [row["row_id"] for row in snapshot_rows(tmp_path, write_jsonl(tmp_path / "one.jsonl", rows))]
    assert len(set(ids)) == 3
    assert all(len(row_id) == 32 for row_id in ids)
    write_jsonl(tmp_path / "x.jsonl", rows[:1])
    write_jsonl(tmp_path / "y.jsonl", rows[1:])
    split = snapshot_rows(tmp_path, tmp_path / "x.jsonl", tmp_path / "y.jsonl", max_tokens=3)
    assert [row["row_id"] for row in split] == ids
    moved = snapshot_rows(tmp_path, write_jsonl(tmp_path / "moved.jsonl", [rows[1], rows[0], rows[2]]))
    assert [row["row_id"] for row in moved] == [ids[1], ids[0], ids[2]]
    other = snapshot_rows(
        tmp_path, write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "sampling_params": {"seed": 1}}])
    )
    assert other[0]["row_id"] not in ids


def test_given_ids_are_used_and_must_be_unique_and_present(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": 7}])
    assert [row["row_id"] for row in snapshot_rows(tmp_path, source, id_column="id")] == ["x", "7"]
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}])
    with pytest.raises(UserError, match=r"id_column: id 'x' is used twice, again in .*twice\.jsonl line 2"):
        snapshot_rows(tmp_path, twice, id_column="id")
    absent = write_jsonl(tmp_path / "absent.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b"}])
    with pytest.raises(UserError, match=r"id_column: .*line 2 has 'id' = None"):
        snapshot_rows(tmp_path, absent, id_column="id")
    with pytest.raises(UserError, match=r"id_column: .* has no column 'key'; columns: prompt, id"):
        snapshot_rows(tmp_path, source, id_column="key")


def test_expected_lengths_are_numbers_or_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": 7}, {"prompt": "b", "n": 2.5}, {"prompt": "c"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    lengths = [row["expected_tokens"] for row in snapshot_rows(tmp_path, source, length_column="n")]
    assert lengths == [7, 3, None]
    assert [row["expected_tokens"] for row in snapshot_rows(tmp_path, source)] == [None] * 3
    (tmp_path / "n.csv").write_text("prompt,n\na,12\n")
    assert snapshot_rows(tmp_path, tmp_path / "n.csv", length_column="n")[0]["expected_tokens"] == 12
    with pytest.raises(UserError, match=r"length_column: .* has no column 'm'; columns: prompt, n"):
        snapshot_rows(tmp_path, source, length_column="m")


@pytest.mark.parametrize("value", ["long", -1, True, float("inf"), 2**31])
def test_a_length_that_is_none_is_refused_with_its_place(tmp_path: Path, value: Any) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a", "n": 7}, {"prompt": "b", "n": value}])
    with pytest.raises(UserError, match=rf"length_column: .*in\.jsonl line 2 has 'n' = {value!r}; lengths are numbers"):
        snapshot_rows(tmp_path, source, length_column="n")


def test_sampled_rows_get_a_seed_of_their_own_that_repeats(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "a", "sampling_params": {"seed": 5}}])

    def seeds(**settings: Any) -> list[int]:
        rows = snapshot_rows(tmp_path, source, temperature=1.0, **settings)
        return [json.loads(row["sampling_params"])["seed"] for row in rows]

    assert seeds() == seeds()
    assert seeds()[1] == 5
    assert seeds(seed=1)[0] != seeds()[0]
    greedy = snapshot_rows(tmp_path, source)
    assert "seed" not in json.loads(greedy[0]["sampling_params"])


def test_the_hash_changes_with_prompts_but_not_with_defaults(tmp_path: Path) -> None:
    def digest(name: str, rows: list[Any], **settings: Any) -> str:
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        return write_snapshot(GenerateJobConfig.build({"prompts": [str(source)], **settings}), tmp_path / name).sha256

    first = digest("one", [{"id": "x", "prompt": "a"}], id_column="id")
    assert digest("two", [{"id": "x", "prompt": "a"}], id_column="id", max_tokens=3, temperature=1.0) == first
    assert digest("three", [{"id": "x", "prompt": "b"}], id_column="id") != first


def test_limit_reads_only_the_first_rows(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": str(i)} for i in range(3000)])
    rows = snapshot_rows(tmp_path, source, source, limit=1030)
    assert [row["prompt"] for row in rows] == [str(i) for i in range(1030)]
    assert [row["row_index"] for row in rows] == list(range(1030))


def test_kept_columns_have_the_types_of_the_source(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a"],
            "day": pa.array([1], pa.date32()),
            "tags": pa.array([["x"]], pa.list_(pa.string())),
            "other": [1],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    schema = snapshot_schema(tmp_path, tmp_path / "in.parquet", keep_columns=["day", "tags"])
    kept = {item.name: item.type for item in schema if item.name.startswith(KEPT_PREFIX)}
    assert kept == {KEPT_PREFIX + "day": pa.date32(), KEPT_PREFIX + "tags": pa.list_(pa.string())}


def test_all_columns_can_be_kept_and_json_types_are_merged(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "score": 1}] * 1500 + [{"prompt": "a", "score": 0.5, "late": "x", "empty": None}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    made = snapshot_rows(tmp_path, source, keep_columns="all")
    assert made[0][KEPT_PREFIX + "score"] == 1.0
    assert made[-1][KEPT_PREFIX + "score"] == 0.5
    assert made[0][KEPT_PREFIX + "late"] is None
    assert made[-1][KEPT_PREFIX + "late"] == "x"
    assert made[-1][KEPT_PREFIX + "empty"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_column": "text"},
            r"prompt_column: .*in\.jsonl' has no column 'text'; columns: question, finish_reason",
        ),
        ({}, r"has no column 'prompt' or 'messages' or 'prompt_token_ids'; columns: question, finish_reason"),
        (
            {"prompt_column": "question", "keep_columns": ["answer"]},
            r"keep_columns: .* has no column 'answer'; columns: question, finish_reason",
        ),
        (
            {"prompt_column": "question", "keep_columns": ["finish_reason"]},
            r"keep_columns: 'finish_reason' is a column of the output",
        ),
    ],
)
def test_a_missing_or_colliding_column_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": "a", "finish_reason": "b"}])
    with pytest.raises(UserError, match=message):
        snapshot_rows(tmp_path, source, **settings)


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "photo.png").write_text("")
    (tmp_path / "nothing").mkdir()
    cases = {
        "absent.jsonl": "file not found: .*absent.jsonl",
        "absent*.jsonl": "no file matches .*absent",
        "broken.parquet": "broken.parquet' is not a Parquet file",
        "empty.csv": "empty.csv' is not a CSV file",
        "empty.jsonl": "no rows in .*empty.jsonl",
        "photo.png": "photo.png' is none of .jsonl",
        "nothing": "folder .*nothing' holds no .jsonl",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"prompts: .*{message}"):
            snapshot_rows(tmp_path, tmp_path / name)


def test_a_saved_dataset_with_splits_uses_train(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"prompt": [name]}) for name in ("test", "train")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert [row["prompt"] for row in snapshot_rows(tmp_path, tmp_path / "both")] == ["train"]
    datasets.DatasetDict({"a": parts["test"], "b": parts["train"]}).save_to_disk(tmp_path / "neither")
    with pytest.raises(UserError, match="has the splits a, b; name one"):
        snapshot_rows(tmp_path, tmp_path / "neither")


def test_a_hub_name_that_cannot_be_loaded_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("hf:no-such-org/no-such-data:train", "no-such-org/no-such-data"):
        with pytest.raises(UserError, match="neither a file nor a folder, and no data set by that name") as error:
            snapshot_rows(tmp_path, name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"a hub data set is hf:NAME\[:CONFIG\]\[:SPLIT\], got 'hf:a:b:c:d'"):
        snapshot_rows(tmp_path, "hf:a:b:c:d")
