"""The folder of a router checkpoint: ``routers.safetensors`` and ``routers.json``. Nothing in it is executable.

Certificates, where there are any, are part of ``routers.json``: readers that do not know them see a checkpoint without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_ray.exits.certificates import Certificate
from tide_ray.files import appearing
from tide_ray.types import UserError

WEIGHTS_FILE, FACTS_FILE = "routers.safetensors", "routers.json"
FORMAT = "tide-ray routers, version 2"
MAX_FACTS_BYTES = 16 << 20


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write ``facts``, durably."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(facts, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_facts(path: Path) -> dict[str, Any]:
    """All that ``routers.json`` says. Raises UserError where ``path`` is no checkpoint of this format."""
    file = path / FACTS_FILE
    if not file.is_file() or not (path / WEIGHTS_FILE).is_file():
        raise UserError(f"exits must be a router checkpoint ({FACTS_FILE}, {WEIGHTS_FILE}), got {str(path)!r}")
    if file.stat().st_size > MAX_FACTS_BYTES:
        raise UserError(f"exits: {FACTS_FILE} is larger than {MAX_FACTS_BYTES >> 20} MiB in {str(path)!r}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"exits: {FACTS_FILE} is not JSON in {str(path)!r} ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"exits: format: expected {FORMAT!r}, got {found!r} in {str(path)!r}")
    return raw


def add_certificates(
    folder: str | os.PathLike[str], certificates: Sequence[Certificate], figures: Mapping[str, Any]
) -> None:
    """Put certificates into a checkpoint, at once or not at all, with the figures of the run that made them.

    Certificates for the same epsilon and loss are replaced.
    """
    path = Path(folder)
    raw = read_facts(path)
    replaced = {(c.epsilon, c.loss) for c in certificates}
    kept = [entry for entry in raw.get("certificates", []) if (entry["epsilon"], entry["loss"]) not in replaced]
    raw["certificates"] = [*kept, *(certificate.to_json() for certificate in certificates)]
    raw["certification"] = dict(figures)
    with appearing(path / FACTS_FILE) as unfinished:
        write_facts(unfinished, raw)


def read_certificates(folder: str | os.PathLike[str]) -> list[Certificate]:
    """The certificates of a checkpoint, without its weights.

    Raises:
        UserError: the folder is no checkpoint, or they are damaged.
    """
    path = Path(folder)
    try:
        return [Certificate.from_json(entry) for entry in read_facts(path).get("certificates", [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"exits: a damaged certificate in {str(path)!r} ({error})") from None


def check_output_folder(path: Path) -> None:
    """A checkpoint replaces only a checkpoint (or an empty folder). Raises UserError for anything else."""
    if path.is_dir() and any(path.iterdir()) and not (path / FACTS_FILE).is_file():
        raise UserError(f"output: a folder that is not a router checkpoint is in the way, got {str(path)!r}")
    if path.exists() and not path.is_dir():
        raise UserError(f"output must be a folder, got the file {str(path)!r}")


def routers_identity(folder: str | os.PathLike[str]) -> str:
    """What identifies a checkpoint's contents. Raises UserError when it is none."""
    path = Path(folder)
    read_facts(path)
    return identity_of(path)


def weights_sha256(folder: str | os.PathLike[str]) -> str:
    """A digest of a checkpoint's weights, which certificates hold for."""
    return _digest(Path(folder) / WEIGHTS_FILE)


def identity_of(path: Path) -> str:
    """A digest of both files, for run records."""
    return _digest(path / FACTS_FILE, path / WEIGHTS_FILE)[:16]


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
