"""API keys: made here, kept as SHA-256 hashes, compared in constant time.

Keys are 256 random bits, so a plain hash keeps them as safe at rest as a slow one would. Entries read
``NAME:sha256:HEX``; a file has one a line, and ``#`` comments. ``TIDE_RAY_API_KEYS`` may hold entries or, for secrets
that an environment injects, keys themselves, separated by commas; those are hashed as they are read.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from tide_ray.types import UserError

ENVIRONMENT_VARIABLE = "TIDE_RAY_API_KEYS"
KEY_PREFIX = "tide-"
MIN_KEY_LENGTH = 16
_ENTRY = re.compile(r"([A-Za-z0-9_.-]{1,64}):sha256:([0-9a-f]{64})")


def new_key() -> str:
    """A fresh key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def stored(name: str, key: str) -> str:
    """The entry to keep of a key. Raises UserError for a name that no entry can have."""
    entry = f"{name}:sha256:{sha256(key.encode()).hexdigest()}"
    if not _ENTRY.fullmatch(entry):
        raise UserError(f"name must have up to 64 letters, digits and _ . -, got {name!r}")
    return entry


def append_to_file(path: str, entry: str) -> None:
    """Add an entry to a file of keys, which only its owner may read if it is new.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(entry + "\n")
    except OSError as error:
        raise UserError(f"file: cannot write {path!r}: {error.strerror}") from None


def check_stored(entry: str) -> None:
    """Raises UserError for anything but an entry. The message does not repeat it: it may be a key."""
    if not _ENTRY.fullmatch(entry):
        raise UserError("api_keys: an entry must read NAME:sha256:HEX (tide-ray api-key makes them), got another form")


def read_keys(entries: Iterable[str] = (), path: str | None = None) -> KeyRing:
    """The keys of a configuration, of a file and of the environment together.

    Raises:
        UserError: a file that cannot be read or an entry that is none, by line, never by content.
    """
    found = list(entries)
    if path is not None:
        found += _file_entries(path)
    for number, item in enumerate(filter(None, map(str.strip, os.environ.get(ENVIRONMENT_VARIABLE, "").split(",")))):
        if _ENTRY.fullmatch(item):
            found.append(item)
        elif len(item) < MIN_KEY_LENGTH:
            raise UserError(f"{ENVIRONMENT_VARIABLE}: key {number + 1} has fewer than {MIN_KEY_LENGTH} characters")
        else:
            found.append(stored(f"env-{number + 1}", item))
    return KeyRing(found)


def _file_entries(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"api_keys_file: cannot read {path!r}: {reason}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            if not _ENTRY.fullmatch(text):
                raise UserError(f"api_keys_file: line {number} of {path!r} must read NAME:sha256:HEX")
            entries.append(text)
    if not entries:
        raise UserError(f"api_keys_file: no keys in {path!r}")
    return entries


class KeyRing:
    """Who may come in.

    Args:
        entries: as kept; the digests are all that it knows.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._digests: list[tuple[str, bytes]] = []
        for entry in entries:
            check_stored(entry)
            name, _, digest = entry.split(":")
            self._digests.append((name, bytes.fromhex(digest)))

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(f"{name}:sha256:{digest.hex()}" for name, digest in self._digests)

    def owner(self, key: str) -> str | None:
        """The name that a key belongs to, None for a wrong one. Every digest is compared, wherever a match lies."""
        digest = sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found
