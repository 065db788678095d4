"""The calls into transformers' ``from_pretrained``: quiet, complete weights or an error, and one-line errors."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
)
from transformers.utils import logging as transformers_logging

from tide_ray.messages import named
from tide_ray.types import UserError

if TYPE_CHECKING:  # PreTrainedModel brings all of transformers' model code, and a driver reads only configurations
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and warnings inside the block.

    A verbosity that the user chose stays, and so do the download bars of huggingface_hub.
    """

    def hide(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return factory(*args, **{**options, "disable": True})

    verbosity = transformers_logging.get_verbosity()
    previous_hook = transformers_logging.set_tqdm_hook(hide)
    if verbosity == logging.WARNING:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(previous_hook)


@contextmanager
def _as_user_error(what: str, name: str, options: dict[str, Any]) -> Iterator[None]:
    """Every error of reading files that the user chose becomes one line; the original is its cause."""
    if options.get("gguf_file"):
        name = os.path.join(name, options["gguf_file"])
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, GatedRepoError):
                raise UserError(gated_message(name)) from error
            if isinstance(cause, LocalEntryNotFoundError):
                raise UserError(no_network_message(name)) from error
            if isinstance(cause, RepositoryNotFoundError):
                raise UserError(unknown_id_message(name)) from error
            cause = cause.__cause__
        raise UserError(f"model: cannot read the {what} of {name!r}: {named(error)}") from error


def unknown_id_message(name: str) -> str:
    return f"model: no such folder or hub id (or a private one: try `hf auth login`), got {name!r}"


def gated_message(name: str) -> str:
    return f"model: no access to this gated model (try `hf auth login`), got {name!r}"


def no_network_message(name: str) -> str:
    return f"model: the model hub cannot be reached; a local folder or .gguf file works without network, got {name!r}"


def read_config(name: str, **options: Any) -> PreTrainedConfig:
    """The configuration of a folder, hub id or .gguf file. Raises UserError."""
    with _as_user_error("configuration", name, options), quiet_transformers():
        return AutoConfig.from_pretrained(name, **options)


def read_model(name: str, config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model on the CPU, in ``dtype``, for inference only.

    Raises:
        UserError: the weights cannot be read, or do not hold every parameter (transformers would make up the rest).
    """
    if options.get("gguf_file"):
        options["quantization_config"] = GgufConfig(dequantize=True)
    # The bar of GGUF conversion is a bare tqdm, which no setting of transformers turns off.
    quiet_bar = redirect_stderr(io.StringIO()) if options.get("gguf_file") else nullcontext()
    with _as_user_error("weights", name, options), quiet_transformers(), quiet_bar:
        result: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **options
        )
    model, info = result
    absent = sorted(info["missing_keys"])
    if absent:
        raise UserError(f"model: the weights lack {len(absent)} parameters, the first is {absent[0]!r}, got {name!r}")
    return model.eval().requires_grad_(False)


def read_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id or .gguf file. Raises UserError."""
    with _as_user_error("tokenizer", name, options), quiet_transformers():
        return AutoTokenizer.from_pretrained(name, **options)
