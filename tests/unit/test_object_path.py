"""Paths on an object store, asked of a real S3 server: what is there, what may be replaced, and what errors say."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tide_ray.data import object_client, storage
from tide_ray.data.object_path import NEW, ChangedError, ObjectPath
from tide_ray.data.reading import fetched, for_arrow
from tide_ray.data.storage import commit_file, committing, open_attempt, prepare_output, remove_folder, storage_path
from tide_ray.types import UserError


@pytest.fixture
def _other_aws() -> Iterator[None]:
    """A process asks but once where S3 is and who it is there."""
    object_client.aws.cache_clear()
    yield
    object_client.aws.cache_clear()


@pytest.fixture
def folder(bucket: str) -> ObjectPath:
    path = storage_path(f"{bucket}/some/out/", "output")
    assert isinstance(path, ObjectPath)
    return path


def test_names_are_those_of_pathlib(folder: ObjectPath) -> None:
    path = folder / "data" / "part-1.jsonl.gz"
    assert str(path) == f"s3://{folder.bucket}/some/out/data/part-1.jsonl.gz"
    assert (path.name, path.stem, path.suffix) == ("part-1.jsonl.gz", "part-1.jsonl", ".gz")
    assert path.parent == folder / "data"
    assert str(path.relative_to(folder)) == "data/part-1.jsonl.gz"
    assert str(folder.with_name("out-2")) == f"s3://{folder.bucket}/some/out-2"
    assert pickle.loads(pickle.dumps(path)) == path


def test_what_is_there_is_found_and_neighbours_are_not(folder: ObjectPath) -> None:
    assert not folder.is_dir()
    for name in ("a.parquet", "data/b.parquet", "data/c.json", "data/deep/d.parquet"):
        (folder / name).write_text(name)
    (folder.with_name("outer") / "e.parquet").write_text("")
    assert folder.is_dir()
    assert not (folder / "dat").is_dir()
    assert (folder / "data" / "c.json").exists()
    assert not (folder / "data").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a.parquet", "data"]
    assert [str(path.relative_to(folder)) for path in (folder / "data").glob("*.parquet")] == ["data/b.parquet"]
    assert sorted(path.name for path in folder.rglob("*.parquet")) == ["a.parquet", "b.parquet", "d.parquet"]
    assert [path.name for path in (folder / "**" / "[ad].parquet").matches()] == ["a.parquet", "d.parquet"]
    assert [path.name for path in (folder / "*" / "*.parquet").matches()] == ["b.parquet"]
    (folder / "data" / "c.json").unlink()
    assert not (folder / "data" / "c.json").exists()
    remove_folder(folder)
    assert not folder.is_dir()
    assert (folder.with_name("outer") / "e.parquet").exists()


def test_a_put_can_be_made_to_replace_nothing_or_just_what_was_read(folder: ObjectPath) -> None:
    path = folder / "x"
    path.put(b"first", NEW)
    with pytest.raises(FileExistsError):
        path.put(b"second", NEW)
    text, version = path.read_version()
    assert text == "first"
    newer = path.put(b"third", version)
    with pytest.raises(ChangedError):
        path.put(b"fourth", version)
    assert path.read_version() == ("third", newer)
    assert next(folder.glob("x")).stat().version == newer


def test_files_are_read_in_parts_and_as_a_whole(folder: ObjectPath) -> None:
    table = pa.table({"row_id": [f"{i}" for i in range(50_000)], "text": ["some text"] * 50_000})
    path = folder / "big.parquet"
    with storage.writing(path) as stream:
        pq.write_table(table, stream)
    assert pq.read_table(for_arrow(path), columns=["row_id"]) == table.select(["row_id"])
    with fetched(path) as local:
        assert pq.read_table(local) == table
    assert not local.exists()
    (folder / "lines").write_text("one\ntwo\n" * 5)
    with (folder / "lines").open() as stream:
        assert list(stream) == [b"one\n", b"two\n"] * 5
    with (folder / "lines").open(buffering=0) as stream:
        stream.seek(-4, io.SEEK_END)
        assert (stream.read(100), stream.read(1)) == (b"two\n", b"")


def test_a_block_that_raises_leaves_nothing(folder: ObjectPath) -> None:
    open_attempt(folder / "_tmp" / "a")
    for block in (storage.writing(folder / "x"), committing(folder / "_tmp" / "a", folder / "y")):
        with suppress(ZeroDivisionError), block as stream:
            stream.write(b"half of")
            raise ZeroDivisionError
    assert [path.name for path in folder.iterdir()] == ["_tmp"]


def test_nothing_is_committed_once_the_attempt_is_over(folder: ObjectPath) -> None:
    open_attempt(folder / "_tmp" / "a")
    with committing(folder / "_tmp" / "a", folder / "x") as stream:
        stream.write(b"in time")
    with pytest.raises(FileNotFoundError):  # noqa: SIM117
        with committing(folder / "_tmp" / "a", folder / "y"):
            remove_folder(folder / "_tmp")
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_a_move_leaves_one_object(folder: ObjectPath) -> None:
    (folder / "x").write_text("moved")
    commit_file(folder / "x", folder / "deep" / "y")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["deep/y"]
    assert (folder / "deep" / "y").read_text() == "moved"


def test_a_bucket_that_is_not_there_is_said_to_be(bucket: str) -> None:
    path = storage_path(f"{bucket}-absent/x", "output")
    assert isinstance(path, ObjectPath)
    for ask in (path.read_text, path.stat, lambda: path.put(b""), lambda: prepare_output(path), path.is_dir):
        with pytest.raises(FileNotFoundError, match="no such bucket or object"):
            ask()


@pytest.mark.usefixtures("_other_aws")
def test_a_store_that_does_not_answer_is_named_soon(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setitem(object_client.RETRIES, "max_retries", 1)
    start = time.monotonic()
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1") as error:
        storage_path(f"{bucket}-elsewhere/x", "output").stat()
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)
    assert "not-to-be-seen" not in str(error.value)


@pytest.mark.usefixtures("_other_aws")
def test_without_credentials_nobody_is_asked(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PermissionError, match="no AWS credentials"):
        storage_path(f"{bucket}-unknown/x", "output").stat()


def test_a_store_without_conditions_is_refused(folder: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs would own the output at once. Here the client leaves the condition away, as old servers ignore it."""
    put = object_client.Bucket.put
    monkeypatch.setattr(object_client.Bucket, "put", lambda self, key, content, only_if: put(self, key, content, "any"))
    with pytest.raises(OSError, match="ignores If-None-Match"):
        prepare_output(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("s3://", "output must be a path or s3://BUCKET/KEY, "),
        ("ftp://server/x", "output must be a path or s3://BUCKET/KEY, "),
        ("s3://key:secret@bucket/x", "output: credentials do not belong into a URL"),
    ],
)
def test_other_urls_are_refused_without_their_secrets(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        storage_path(value, "output")
    assert "secret" not in str(error.value)


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"output: for object stores run pip install 'tide-ray\[s3\]', got 's3://b/x'"):
        storage_path("s3://b/x", "output")
    assert storage_path("out", "output") == Path("out")


def test_a_version_is_the_same_however_it_was_learnt() -> None:
    """Azure's listings give tags without quotes, its answers to puts with them; conditions need them."""
    listed, put = (object_client.version_of({"e_tag": tag, "version": None}) for tag in ("0x24", '"0x24"'))
    assert listed == put == {"e_tag": '"0x24"'}
    assert object_client.version_of({"e_tag": None, "version": "7"}) == {"version": "7"}
