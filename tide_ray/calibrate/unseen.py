"""For a checkpoint: the model it was made for, and prompts that calibration has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_ray.calibrate.config import CheckpointPrompts
from tide_ray.calibrate.corpus import as_chat, read_rows
from tide_ray.exits.checkpoint import Routers
from tide_ray.models.loading import LoadedModel, load
from tide_ray.types import Prompt, UserError


def unseen_rows(
    config: CheckpointPrompts, routers: Routers, also: Sequence[str] = ()
) -> list[tuple[Prompt, dict[str, Any]]]:
    """The prompts of ``config`` with their rows' values, ``also`` those of further columns.

    Raises:
        UserError: calibration has seen some of them, or there are not as many.
    """
    training = routers.facts.training
    settings: Mapping[str, Any] = training.get("settings", {})
    known = {_resolved(source) for source in settings.get("prompts", [])} or {""}
    shared = [source for source in config.prompts or [""] if _resolved(source) in known]
    num_seen = settings.get("num_prompts")
    if training.get("source") == "own answers" and shared and (num_seen is None or config.skip < num_seen):
        seen = "all of them" if num_seen is None else f"the first {num_seen}"
        raise UserError(
            f"prompts: the checkpoint was calibrated on {seen} of {shared[0] or 'the bundled prompts'!r}; "
            f"leave them out with skip, or use others, got skip {config.skip}"
        )
    raw = settings.get("raw", False) if config.raw is None else config.raw
    wraps = not raw and routers.facts.chat_template != "none"
    limit = None if config.num_prompts is None else config.num_prompts + config.skip
    rows = read_rows(config.prompts, column=config.prompt_column, limit=limit, also=also)
    if len(rows) <= config.skip:
        raise UserError(f"skip: the sources have {len(rows)} usable prompts, got {config.skip}")
    return [(as_chat(prompt) if wraps else prompt, values) for prompt, values in rows[config.skip :]]


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if source else ""


def load_for(config: CheckpointPrompts, routers: Routers) -> LoadedModel:
    """The model that a checkpoint was made for, or the one that ``config`` names."""
    settings: Mapping[str, Any] = routers.facts.training.get("settings", {})
    model = config.model or settings.get("model")
    if model is None:
        raise UserError("model: the checkpoint does not say which model it is for, got none")
    return load(
        model,
        revision=config.revision or settings.get("revision"),
        dtype=config.dtype or routers.facts.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
