"""What identifies a model's output: a digest of its configuration, tokenizer files and weights, fast to compute.

Weight files are sampled, not read whole: name, size, first and last MiB (a safetensors header lies in the first) and
4 KiB at 1024 evenly spaced places, so that every large tensor contributes. A change confined to bytes between the
samples goes unnoticed; time stamps, the folder's name, and the dtype it runs in do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tide_ray.types import UserError

VOLATILE_KEYS = frozenset(
    {
        "_from_model_config",
        "_name_or_path",
        "backend",
        "dtype",
        "is_local",
        "local_files_only",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
    }
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
"""Any one of these means that the model comes with a tokenizer."""
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)

_WEIGHT_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_MIB = 1 << 20
_NUM_SAMPLES = 1024
_SAMPLE_BYTES = 4096


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would read from ``folder``, in the order of their names.

    Raises:
        UserError: there are none, the index is broken, a shard is missing, or one is a Git LFS pointer.
    """
    files = _named_weights(folder)
    if not files:
        raise UserError(f"model: no weights (model.safetensors or pytorch_model.bin) in the folder {str(folder)!r}")
    for file in files:
        if not file.is_file():
            raise UserError(f"model: the weight file {file.name!r} of the index is missing in {str(folder)!r}")
        with file.open("rb") as stream:
            if stream.read(23) == b"version https://git-lfs":
                raise UserError(f"model: a Git LFS pointer instead of weights (run 'git lfs pull'), got {str(file)!r}")
    return files


def _named_weights(folder: Path) -> list[Path]:
    for single, index in _WEIGHT_LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"model: no weight_map in {str(folder / index)!r}")
            return [folder / name for name in sorted(set(weight_map.values()))]
    return []


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in ``path``. Raises UserError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model: not valid JSON ({error}), got {str(path)!r}") from error
    if not isinstance(content, dict):
        raise UserError(f"model: expected a JSON object in {str(path)!r}")
    return content


def fingerprint(
    *,
    descriptions: Iterable[Path],
    weights: Iterable[Path],
    commit: str | None,
    eos_token_ids: tuple[int, ...],
) -> str:
    """SHA-256, in hex, over everything that changes the output at a given dtype.

    Args:
        descriptions: configuration and tokenizer files, hashed whole (JSON without its volatile keys).
        weights: local weight files, sampled; empty when ``commit`` stands for them.
        commit: the hub commit, which fixes every file.
        eos_token_ids: the ids that end generation.
    """
    digest = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        digest.update(f"{name}:{len(content)}:".encode())
        digest.update(content)

    add("commit", (commit or "").encode())
    add("eos_token_ids", json.dumps(eos_token_ids).encode())
    for path in descriptions:
        add(path.name, _stable_bytes(path))
    for path in weights:
        add(path.name, _sample(path))
    return digest.hexdigest()


def _stable_bytes(path: Path) -> bytes:
    # tokenizer.json is large and has no volatile keys, so it is not parsed.
    if path.name not in ("config.json", "tokenizer_config.json"):
        return path.read_bytes()
    content = {key: value for key, value in read_json(path).items() if key not in VOLATILE_KEYS}
    return json.dumps(content, sort_keys=True).encode()


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_MIB))
        for i in range(1, _NUM_SAMPLES):
            stream.seek(size * i // _NUM_SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(size - _MIB, 0))
        digest.update(stream.read(_MIB))
    return digest.digest()
