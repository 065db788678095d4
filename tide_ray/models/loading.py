"""``load``: a hub id, a folder, a .gguf file or ``demo`` becomes a model ready to run, or a one-line UserError.

Arguments and configuration are checked before weights are read; weights must be complete; nothing is trained and no
code that comes with the weights runs unless asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tide_kernels import gpu
from tide_ray.config import DTYPES, check_choice
from tide_ray.models.find import ModelSource, check_config_file, find_model
from tide_ray.models.fingerprint import TOKENIZER_EXTRAS, TOKENIZER_FILES, fingerprint
from tide_ray.models.pretrained import read_config, read_model, read_tokenizer
from tide_ray.models.supported import check_supported
from tide_ray.types import UserError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, and what identifies it.

    ``fingerprint`` does not depend on dtype or device; a hub model and its copy in a folder differ. ``revision`` is the
    hub commit when known, else the revision asked for, else ``local``. ``tokenizer`` is None when the model comes
    without one: prompts are then token ids.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: str
    source: str
    revision: str
    eos_token_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


class LoadSettings(Protocol):
    """What a configuration says of loading, whatever else it holds; the fields are the arguments of ``load``."""

    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...


def load_as(model: str | os.PathLike[str], settings: LoadSettings) -> LoadedModel:
    """``load`` with the settings of a configuration."""
    return load(
        model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )


def load(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model for inference.

    Args:
        model: a hub id (``org/name``), a folder with config.json and weights, a .gguf file, or ``demo``.
        revision: branch, tag or commit of a hub model.
        dtype: ``auto`` is bfloat16 where the device computes in it, else float16 (GPU) or float32 (CPU).
        device: ``auto`` (cuda when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: run modelling code that comes with the weights.

    Raises:
        UserError: an argument is wrong, or the model cannot be found, read, or run by the engine.
    """
    given = os.fspath(model)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    with missing_kernels_as_user_errors():
        gpu.runs(torch_device, torch_dtype)
    source = find_model(given, revision)
    options: dict[str, Any] = {**source.options, "trust_remote_code": trust_remote_code}
    if source.gguf_file is None:
        check_config_file(source, trust_remote_code)
    weights = source.weights()

    config = read_config(source.name, **options)
    check_supported(config)
    tokenizer = _tokenizer(source, options)
    loaded = read_model(source.name, config, torch_dtype, **options)
    eos_token_ids = _eos_token_ids(loaded, tokenizer)
    described = () if source.gguf_file is not None else ("config.json", *TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    return LoadedModel(
        model=_move(loaded, torch_device),
        tokenizer=tokenizer,
        fingerprint=fingerprint(
            descriptions=source.existing(described),
            weights=weights,
            commit=source.commit,
            eos_token_ids=eos_token_ids,
        ),
        source=given,
        revision=source.commit or revision or "local",
        eos_token_ids=eos_token_ids,
        device=torch_device,
        dtype=torch_dtype,
    )


def load_tokenizer(
    model: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that ``load`` would find, without the weights; None when the model comes without one.

    Raises:
        UserError: the model cannot be found, or its tokenizer cannot be read.
    """
    source = find_model(os.fspath(model), revision)
    return _tokenizer(source, {**source.options, "trust_remote_code": trust_remote_code})


@contextmanager
def missing_kernels_as_user_errors() -> Iterator[None]:
    """What ``TIDE_KERNELS`` asks for and this machine or model does not have becomes a one-line UserError."""
    try:
        yield
    except (gpu.KernelsUnavailable, gpu.UnknownChoice) as error:
        raise UserError(str(error)) from error


def resolve_device(device: str) -> torch.device:
    """The torch device that ``device`` names. Raises UserError when this machine does not have it."""
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device: CUDA is not available here, got {device!r}")
    index = int(device.partition(":")[2]) if ":" in device else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise UserError(f"device: there are {torch.cuda.device_count()} CUDA devices, got {device!r}")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype that ``dtype`` names on ``device``. Raises UserError for an unknown name."""
    check_choice("dtype", dtype, DTYPES)
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _tokenizer(source: ModelSource, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    has_tokenizer = source.gguf_file is not None or any(source.file(name) for name in TOKENIZER_FILES)
    return read_tokenizer(source.name, **options) if has_tokenizer else None


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """All ids of the generation config, else of the configuration, else the tokenizer's."""
    generation_config = getattr(model, "generation_config", None)
    for owner in (generation_config, model.config.get_text_config(decoder=True), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(int(token_id) for token_id in ids)
    return ()


def _move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    try:
        return nn.Module.to(model, device)  # transformers wraps its own `to`, which hides the types
    except torch.OutOfMemoryError as error:
        size_gb = model.get_memory_footprint() / 1e9
        raise UserError(f"device: no room for {size_gb:.1f} GB of weights, got {str(device)!r}") from error
