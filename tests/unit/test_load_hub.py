"""Hub ids, loaded and given to a job: the real hub client against a server here that speaks the hub's protocol.

The client reads its address, cache and offline switch when it is imported, so each situation is one child process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tiny_models import EOS_ID, save_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHILD = """
import json, sys, tempfile
from typer.testing import CliRunner
from tide_ray.cli import app
from tide_ray.data.identity import model_identity
from tide_ray.models.loading import load
from tide_ray.types import UserError

results = []
for model, revision in json.loads(sys.argv[1]):
    try:
        loaded = load(model, revision=revision, device="cpu")
    except UserError as error:
        chosen = ["--model", model, *(["--revision", revision] if revision else [])]
        with tempfile.TemporaryDirectory() as scratch:
            done = CliRunner().invoke(app, ["generate", *chosen, "--output", scratch + "/out"])
        results.append({"error": str(error), "exit_code": done.exit_code, "stderr": done.stderr})
    else:
        facts = {name: getattr(loaded, name) for name in ("fingerprint", "source", "revision", "eos_token_ids")}
        identity = model_identity(model, revision=revision)
        results.append({**facts, "has_tokenizer": loaded.tokenizer is not None, "identity": identity})
print(json.dumps(results))
"""


class HubHandler(BaseHTTPRequestHandler):
    """``/api/models/ID[/revision/R]`` and ``/ID/resolve/R/FILE`` for the folder of each repository."""

    repositories: dict[str, Path]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if repository == "org/gated":
            self.refuse(403, "GatedRepo")
        elif repository not in self.repositories:
            self.refuse(401, "RepoNotFound")
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif is_api and rest[:1] in ([], ["revision"]):
            self.reply(json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
        elif rest[:1] == ["resolve"] and (self.repositories[repository] / rest[2]).is_file():
            self.reply((self.repositories[repository] / rest[2]).read_bytes())
        else:
            self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(b"", status, X_Error_Code=code, X_Error_Message=code)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@dataclass
class Hub:
    """One server, one client cache, and the outcomes of its models with and without the server."""

    online: dict[str, dict[str, Any]] = field(default_factory=dict)
    down: dict[str, dict[str, Any]] = field(default_factory=dict)
    offline: dict[str, dict[str, Any]] = field(default_factory=dict)


def run_child(cases: list[str], cache: Path, port: int, *, is_offline: bool = False) -> dict[str, dict[str, Any]]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(is_offline)),
        "NO_PROXY": "127.0.0.1",
    }
    pairs = [(name, revision or None) for name, _, revision in (case.partition("@") for case in cases)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(pairs)],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    root = tmp_path_factory.mktemp("hub")
    (root / "empty").mkdir()
    HubHandler.repositories = {
        "org/tiny": save_tiny_model("llama", root / "tiny", with_tokenizer=True),
        "org/bare": save_tiny_model("gpt2", root / "bare"),
        "org/empty": root / "empty",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    known = ["org/tiny", "org/bare"]
    wrong = ["org/tiny@nonesuch", "org/none", "org/gated", "org/empty", "not an id"]
    result = Hub(online=run_child([*known, f"org/tiny@{COMMIT}", *wrong], root / "cache", port))
    server.shutdown()
    server.server_close()
    with ThreadPoolExecutor(2) as pool:
        without = [
            pool.submit(run_child, [*known, "org/none"], root / "cache", port, is_offline=is_offline)
            for is_offline in (False, True)
        ]
    result.down, result.offline = (outcome.result() for outcome in without)
    return result


def test_a_hub_id_loads_at_its_commit(hub: Hub) -> None:
    loaded = hub.online["org/tiny"]
    assert loaded["source"] == "org/tiny"
    assert loaded["revision"] == COMMIT
    assert loaded["eos_token_ids"] == [EOS_ID]
    assert loaded["has_tokenizer"]


def test_a_hub_id_without_tokenizer_loads(hub: Hub) -> None:
    assert not hub.online["org/bare"]["has_tokenizer"]


def test_the_default_branch_and_its_commit_are_the_same_model(hub: Hub) -> None:
    for digest in ("fingerprint", "identity"):
        assert hub.online[f"org/tiny@{COMMIT}"][digest] == hub.online["org/tiny"][digest]
    assert hub.online["org/bare"]["fingerprint"] != hub.online["org/tiny"]["fingerprint"]


@pytest.mark.parametrize("state", ["down", "offline"])
def test_a_model_in_the_cache_loads_without_network(hub: Hub, state: str) -> None:
    for name in ("org/tiny", "org/bare"):
        assert getattr(hub, state)[name] == hub.online[name]


@pytest.mark.parametrize("state", ["down", "offline"])
def test_no_network_says_so_and_that_a_folder_works(hub: Hub, state: str) -> None:
    assert getattr(hub, state)["org/none"]["error"] == (
        "model: the model hub cannot be reached; a local folder or .gguf file works without network, got 'org/none'"
    )


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("org/none", "model: no such folder or hub id (or a private one: try `hf auth login`), got 'org/none'"),
        ("not an id", "model: no such folder or hub id (or a private one: try `hf auth login`), got 'not an id'"),
        ("org/gated", "model: no access to this gated model (try `hf auth login`), got 'org/gated'"),
        ("org/tiny@nonesuch", "revision: no such branch, tag or commit of 'org/tiny', got 'nonesuch'"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, case: str, expected: str) -> None:
    assert hub.online[case]["error"] == expected


def test_a_hub_repository_without_config_is_one_line(hub: Hub) -> None:
    assert hub.online["org/empty"]["error"] == "model: no config.json in 'org/empty'"


@pytest.mark.parametrize("state", ["online", "down", "offline"])
def test_a_job_says_the_same_before_it_starts(hub: Hub, state: str) -> None:
    """It reads no weights then, and had ways of its own to find a model, which blamed a wrong revision on the model."""
    failed = [outcome for outcome in getattr(hub, state).values() if "error" in outcome]
    assert failed
    for outcome in failed:
        assert (outcome["exit_code"], outcome["stderr"]) == (2, f"error: {outcome['error']}\n")
