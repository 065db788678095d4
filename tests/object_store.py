"""A real S3 server, as a process of its own, and buckets on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError

from ports import free_port
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.storage import storage_path


class S3Server:
    """Its address, and the variables by which clients find it."""

    def __init__(self) -> None:
        port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
            "AWS_DEFAULT_REGION": "us-east-1",
            # What this machine's user has set up does not matter.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="tester",
            aws_secret_access_key="not-to-be-seen",
            region_name="us-east-1",
        )

    def make_bucket(self) -> str:
        """The URL of a new one."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def stop(self) -> None:
        """From now on connections are refused."""
        self._process.kill()
        self._process.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client.list_buckets()
                return
            except BotoCoreError:
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.1)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """One that lasts for the block."""
    server = S3Server()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def upload(folder: Path, url: str) -> None:
    """Put all files of a folder below ``url``, where clients of this process look."""
    target = storage_path(url, "output")
    assert isinstance(target, ObjectPath)
    for file in folder.rglob("*"):
        if file.is_file():
            (target / file.relative_to(folder).as_posix()).put(file.read_bytes())
