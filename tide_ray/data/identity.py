"""What a job must know of its model before Ray starts: that it is there, that it can run, and its fingerprint.

No weights are loaded, so a wrong name costs a second instead of a cluster's start-up.
"""

from __future__ import annotations

from pathlib import Path

from tide_ray.models.demo import demo_model_path
from tide_ray.models.fingerprint import TOKENIZER_EXTRAS, TOKENIZER_FILES, fingerprint, weight_files
from tide_ray.models.load import DEMO
from tide_ray.models.pretrained import read_config
from tide_ray.models.supported import check_supported
from tide_ray.types import UserError


def model_identity(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """A digest of the model's files, the hub commit for a hub model; the same for the same model anywhere.

    Raises:
        UserError: the model cannot be found, its files are incomplete, or the engine cannot run its architecture.
    """
    path = demo_model_path() if model == DEMO else Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model must be a hub id, a folder, a .gguf file or 'demo', got the file {model!r}")
        return fingerprint(descriptions=[], weights=[path], commit=None, eos_token_ids=())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: no config.json in the folder {model!r}")
        weights = weight_files(path)
        check_supported(read_config(str(path), local_files_only=True, trust_remote_code=trust_remote_code))
        names = ("config.json", "generation_config.json", *TOKENIZER_FILES, *TOKENIZER_EXTRAS)
        descriptions = [path / name for name in names if (path / name).is_file()]
        return fingerprint(descriptions=descriptions, weights=weights, commit=None, eos_token_ids=())
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix in (".gguf", ".safetensors"):
        raise UserError(f"model: no such folder or file, got {model!r}")
    config = read_config(model, revision=revision, trust_remote_code=trust_remote_code)
    check_supported(config)
    commit = getattr(config, "_commit_hash", None) or revision or model
    return fingerprint(descriptions=[], weights=[], commit=commit, eos_token_ids=())
