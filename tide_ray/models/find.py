"""Where a model's files are: on this machine, or on the hub at a commit. No weights are read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from tide_ray.models.demo import demo_model_path
from tide_ray.models.fingerprint import read_json, weight_files
from tide_ray.models.pretrained import gated_message, no_network_message, unknown_id_message
from tide_ray.types import UserError

DEMO = "demo"
_GGUF = ".gguf"
_HUB_TIMEOUT_S = 30.0
_PATH_LIKE = re.compile(r"[./~]|.*(/.*/|\\|\.(gguf|safetensors|bin|json)$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the files are: a folder, one .gguf file in a folder, or a hub repository at a commit."""

    name: str
    folder: Path | None = None
    gguf_file: str | None = None
    revision: str | None = None
    commit: str | None = None
    is_online: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` that name this source."""
        # Without local_files_only the client retries for most of a minute when there is no network.
        options: dict[str, Any] = {"revision": self.revision, "local_files_only": not self.is_online}
        return options if self.gguf_file is None else {**options, "gguf_file": self.gguf_file}

    def file(self, name: str) -> Path | None:
        """The local path of one file of this source, downloaded if need be; None when it does not exist."""
        found = cached_file(
            self.name,
            name,
            **self.options,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    def existing(self, names: Iterable[str]) -> list[Path]:
        return [path for path in map(self.file, names) if path is not None]

    def weights(self) -> list[Path]:
        """The weight files, none of a hub repository. Raises UserError for a folder where some are missing."""
        if self.folder is None:
            return []
        return weight_files(self.folder) if self.gguf_file is None else [self.folder / self.gguf_file]


def find_model(given: str, revision: str | None) -> ModelSource:
    """What ``load`` takes as a model, found.

    Raises:
        UserError: there is no such folder, file, hub id or revision, or no network to look for it.
    """
    if given == DEMO:
        path = demo_model_path()
        return ModelSource(name=str(path), folder=path)
    path = Path(os.path.expanduser(given))
    if given and os.path.isdir(path):  # os.path says no where Path raises, e.g. for a name that is too long
        return ModelSource(name=str(path), folder=path)
    if given.endswith(_GGUF) and os.path.isfile(path):
        return ModelSource(name=str(path.parent), folder=path.parent, gguf_file=path.name)
    if given and os.path.exists(path):
        raise UserError(f"model must be a hub id, a folder, a .gguf file or 'demo', got the file {given!r}")
    if not given or _PATH_LIKE.match(given):
        raise UserError(f"model: no such folder or file, got {given!r}")
    return _find_on_hub(given, revision)


def _find_on_hub(name: str, revision: str | None) -> ModelSource:
    api, is_online = HfApi(), True
    try:
        api.model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise UserError(gated_message(name)) from error
    except RevisionNotFoundError as error:
        raise UserError(f"revision: no such branch, tag or commit of {name!r}, got {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(unknown_id_message(name)) from error
    except Exception:  # whatever the hub client's HTTP library raises: what is in the cache still works
        is_online = False
    try:
        resolved = api.resolve_revision(name, revision=revision, local_files_only=not is_online)
    except Exception as error:
        raise UserError(no_network_message(name)) from error
    return ModelSource(name=name, revision=resolved, commit=resolved.resolved, is_online=is_online)


def check_config_file(source: ModelSource, trust_remote_code: bool) -> None:
    """Raises UserError for a model without config.json, of an unknown type, or that brings code of its own."""
    path = source.file("config.json")
    if path is None and source.folder is None and not source.is_online:
        raise UserError(no_network_message(source.name))
    if path is None:
        raise UserError(f"model: no config.json in {source.name!r}")
    raw = read_json(path)
    model_type, auto_map = raw.get("model_type"), raw.get("auto_map")
    if model_type in CONFIG_MAPPING:
        return
    if auto_map and not trust_remote_code:
        raise UserError(
            f"model: {source.name!r} brings its own modelling code for model type {model_type!r}; "
            "pass --trust-remote-code (trust_remote_code=True) to run it"
        )
    if not auto_map:
        raise UserError(f"model: {source.name!r} has a model type that transformers does not know, got {model_type!r}")
