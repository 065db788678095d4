"""Requests to object stores, and what their errors mean. Needs the extra ``s3``.

``obstore`` (Rust's object_store, without Python dependencies) makes the requests: of the clients at hand it is the one
whose interface has conditional puts, by absence and by version, for S3, GCS and Azure alike; Arrow's file systems have
none, and fsspec's have them by absence only. Where to find S3 and with which credentials is asked of boto3, so that
variables, profiles, roles and ``AWS_ENDPOINT_URL`` mean what they mean to every other program.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import boto3
import obstore
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store, from_url

from tide_ray.data.object_path import ANY, NEW, ChangedError, ObjectFacts, UnavailableError

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult
    from obstore.store import ObjectStore, RetryConfig

NOT_FOUND, FORBIDDEN = "status code: 404", "status code: 403"  # listings have no errors of their own for these
AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
RETRIES: RetryConfig = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=180),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
"""Some twenty seconds for a server that refuses connections, longer for one that answers slowly."""


@cache
def bucket(scheme: str, name: str) -> Bucket:
    """The bucket, with this process's credentials."""
    return Bucket(f"{scheme}://{name}")


class Bucket:
    """Requests to one bucket. Keys and folders have no slash at either end; "" is the bucket itself."""

    def __init__(self, url: str) -> None:
        self._url = url
        with self._errors(""):
            self._store = _open_store(url)

    def head(self, key: str) -> ObjectFacts:
        with self._errors(key):
            return _facts(obstore.head(self._store, key))

    def get(self, key: str) -> tuple[bytes, dict[str, Any]]:
        """The content and its version."""
        with self._errors(key):
            result = obstore.get(self._store, key)
            return bytes(result.bytes()), version_of(result.meta)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        with self._errors(key):
            return bytes(obstore.get_range(self._store, key, start=start, end=end))

    def put(self, key: str, content: bytes | BinaryIO, only_if: dict[str, Any] | str) -> dict[str, Any]:
        mode: Any = {ANY: "overwrite", NEW: "create"}[only_if] if isinstance(only_if, str) else only_if
        with self._errors(key):
            return version_of(obstore.put(self._store, key, content, mode=mode))

    def below(self, folder: str) -> Iterator[tuple[str, ObjectFacts]]:
        """All objects whose keys begin with the folder's, in no particular order."""
        with self._errors(folder):
            for chunk in obstore.list(self._store, folder or None, chunk_size=1000):
                yield from ((meta["path"], _facts(meta)) for meta in chunk)

    def directly_in(self, folder: str) -> tuple[list[tuple[str, ObjectFacts]], list[str]]:
        """Objects in the folder, and the folders in it."""
        with self._errors(folder):
            found = obstore.list_with_delimiter(self._store, folder or None)
            return [(meta["path"], _facts(meta)) for meta in found["objects"]], list(found["common_prefixes"])

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            with self._errors(keys[0]):
                obstore.delete(self._store, list(keys))

    def copy(self, source: str, target: str) -> None:
        with self._errors(source):
            obstore.copy(self._store, source, target)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """What the client raises as the OSError that a file system would raise, with a reason in one line."""
        name = f"{self._url}/{key}".rstrip("/")
        try:
            yield
        except AlreadyExistsError:
            raise FileExistsError(errno.EEXIST, "the object exists", name) from None
        except PreconditionError:
            raise ChangedError(errno.EBUSY, "the object has changed", name) from None
        except (BaseError, BotoCoreError, FileNotFoundError) as error:
            reason = _reason(error)
            if isinstance(error, FileNotFoundError) or NOT_FOUND in reason:
                raise FileNotFoundError(errno.ENOENT, "no such bucket or object", name) from None
            if isinstance(error, PermissionDeniedError | UnauthenticatedError) or FORBIDDEN in reason:
                raise PermissionError(errno.EACCES, "access denied", name) from None
            raise UnavailableError(errno.EIO, reason, name) from None
        except PermissionError as error:
            raise PermissionError(error.errno, error.strerror, name) from None


def _open_store(url: str) -> ObjectStore:
    if not url.startswith("s3://"):
        return from_url(url, retry_config=RETRIES)
    return S3Store(urlsplit(url).netloc, retry_config=RETRIES, **aws())


@cache
def aws() -> dict[str, Any]:
    """Where this process finds S3 and who it is there, as S3Store takes it."""
    session = boto3.session.Session()
    if session.get_credentials() is None:
        raise PermissionError(errno.EACCES, "no AWS credentials (variables, profile or role) were found")
    endpoint = session.client("s3").meta.endpoint_url
    is_amazon = (urlsplit(endpoint).hostname or "").endswith(AMAZON)
    return {
        "credential_provider": Boto3CredentialProvider(session),
        "client_options": {"allow_http": endpoint.startswith("http://")},
        **({} if is_amazon else {"endpoint": endpoint}),
    }


def _facts(meta: ObjectMeta) -> ObjectFacts:
    return ObjectFacts(meta["size"], int(meta["last_modified"].timestamp() * 1e9), version_of(meta))


def version_of(meta: ObjectMeta | PutResult) -> dict[str, Any]:
    """What tells a version of an object from others, as conditional puts take it."""
    tag = meta["e_tag"]
    # Azure's listings leave out the quotes that its other answers have, and that conditions need.
    versions = {"e_tag": tag and '"' + tag.strip('"') + '"', "version": meta["version"]}
    return {name: value for name, value in versions.items() if value is not None}


def _reason(error: Exception) -> str:
    """The first line, without the answer's text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].partition(": <?xml")[0].split())[:300]
