"""What a job must know of its model before Ray starts: that it is there, that it can run, and its fingerprint.

No weights are loaded, so a wrong name costs a second instead of a cluster's start-up.
"""

from __future__ import annotations

from tide_ray.models.find import check_config_file, find_model
from tide_ray.models.fingerprint import TOKENIZER_EXTRAS, TOKENIZER_FILES, fingerprint
from tide_ray.models.pretrained import read_config
from tide_ray.models.supported import check_supported


def model_identity(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """A digest of the model's files, the hub commit for a hub model; the same for the same model anywhere.

    Raises:
        UserError: the model cannot be found, its files are incomplete, or the engine cannot run its architecture.
    """
    source = find_model(model, revision)
    if source.gguf_file is not None:
        return fingerprint(descriptions=[], weights=source.weights(), commit=None, eos_token_ids=())
    check_config_file(source, trust_remote_code)
    weights = source.weights()
    check_supported(read_config(source.name, **source.options, trust_remote_code=trust_remote_code))
    names = ("config.json", "generation_config.json", *TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    descriptions = source.existing(names) if source.folder is not None else []  # of a hub model the commit says it all
    return fingerprint(descriptions=descriptions, weights=weights, commit=source.commit, eos_token_ids=())
