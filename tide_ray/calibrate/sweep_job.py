"""One model of a sweep as the driver sees it: what can be started next, and how it ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tide_ray.calibrate.calibration import fitting_examples
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.corpus import read_lines, read_prompts, split
from tide_ray.calibrate.sweep_config import SweepModel
from tide_ray.calibrate.sweep_folder import PHASES, ModelFolder, shards
from tide_ray.calibrate.sweep_report import FAILED, KEPT, OK, STOPPED
from tide_ray.calibrate.sweep_task import LOADING, Task
from tide_ray.data.identity import model_identity
from tide_ray.data.storage import commit_file
from tide_ray.exits.checkpoint_files import routers_identity
from tide_ray.files import local_path
from tide_ray.models.find import DEMO
from tide_ray.types import UserError

SOURCE_FIELDS = ("prompts", "text", "prompt_column", "num_prompts")
ANSWER_FIELDS = ("revision", "dtype", "raw", "max_tokens")
FIT_FIELDS = ("seed", "boundaries")
ROUTER_FIELDS = ("kv_policy", "rank", "refine", "shortlist", "bottleneck")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is calibrated on: a file with one prompt as JSON a line, or None for text; a digest; prompts."""

    file: str | None
    sha256: str
    num_items: int


def take_inputs(models: Sequence[SweepModel], folder: Path, scratch: Path) -> list[Inputs]:
    """Read each model's prompts and keep them in ``folder``, so that all workers and later runs have the same.

    Raises:
        UserError: they cannot be read, or are fewer than asked for.
    """
    taken: dict[str, Inputs] = {}  # most sweeps have the same prompts for all models, and read them once
    sources = [model.calibration.model_dump_json(include=set(SOURCE_FIELDS)) for model in models]
    for source, model in zip(sources, models, strict=True):
        if source not in taken:
            taken[source] = _take(model.calibration, folder, scratch)
    return [taken[source] for source in sources]


def _take(config: CalibrationConfig, folder: Path, scratch: Path) -> Inputs:
    if config.text is not None:
        text = json.dumps([read_lines(config.text), config.num_prompts])
        return Inputs(None, hashlib.sha256(text.encode()).hexdigest(), 1)
    prompts = read_prompts(config.prompts, column=config.prompt_column, limit=config.num_prompts)
    text = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = folder / f"prompts-{digest[:16]}.jsonl"
    if not file.exists():
        temporary = scratch / file.name
        temporary.write_text(text, encoding="utf-8")
        commit_file(temporary, file)
    return Inputs(str(file), digest, len(prompts))


def located(model: SweepModel, output: Path) -> SweepModel:
    """``model`` with absolute paths: workers may run in another folder."""
    config = model.calibration
    changes: dict[str, Any] = {"output": str(output / model.name)}
    # As find_model has it: what cannot be a path may be a hub id.
    if config.model != DEMO and os.path.exists(path := os.path.expanduser(config.model)):
        changes["model"] = os.path.realpath(path)
    if config.text is not None:
        changes["text"] = str(local_path(config.text, "text").resolve())
    return model.model_copy(update={"calibration": config.model_copy(update=changes)})


@dataclass(slots=True)
class ModelJob:
    """One model's way through the phases. ``status`` is None until it has ended; ``nodes`` by phase."""

    model: SweepModel
    folder: ModelFolder
    inputs: Inputs
    num_gpus: float
    status: str | None = None
    phase: str = LOADING
    error: str | None = None
    nodes: dict[str, list[str]] = field(default_factory=dict)

    def begin(self) -> str:
        """Look at what is there. Returns what there is to say of it, or ""."""
        config = self.model.calibration
        identity = model_identity(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
        common = {"model_identity": identity, "inputs": self.inputs.sha256, "tide_ray_version": version("tide-ray")}
        fields = (ANSWER_FIELDS, FIT_FIELDS, ROUTER_FIELDS)
        settings = {
            phase: {name: getattr(config, name) for name in names} for phase, names in zip(PHASES, fields, strict=True)
        }
        settings["answers"] |= {**common, "source": "prompts" if self.inputs.file else "text"}
        said = self.folder.adopt(settings)
        done = self.folder.done()
        if done is not None and self._is_in_place(done["routers"]):
            self.status = KEPT
        return said

    def next_tasks(self) -> list[Task]:
        """What can run now, given what is finished; nothing when the model has ended. Nothing of it runs already.

        Raises:
            UserError: too few prompts were answered, or a file is damaged.
        """
        if self.status is not None:
            return []
        workers = self.model.resources.workers
        missing = sorted(set(range(self._num_shards())) - self.folder.answered_shards())
        if missing:
            self.phase = "answers"
            return [self._task(PHASES)] if workers == 1 else self._shared("answers", missing)
        self.phase = "fit"
        examples = fitting_examples(split(self.folder.answers()[0], self.model.calibration.seed))
        missing = sorted(set(range(len(shards(len(examples))))) - self.folder.fitted_shards())
        if missing:
            return [self._task(PHASES[1:])] if workers == 1 else self._shared("fit", missing)
        self.phase = "routers"
        done = self.folder.done()
        if done is None or not self._is_in_place(done["routers"]):
            return [self._task(PHASES[2:])]
        self.status = OK
        return []

    def fail(self, phase: str, error: str) -> None:
        self.status, self.phase, self.error = FAILED, phase, error

    def progress(self) -> tuple[str, float]:
        """The phase that is under way, by the files there are, and how much of the model's work is done, from 0 to 1.
        Every phase counts the same."""
        if self.status is not None:
            return self.status, 1.0
        answered = len(self.folder.answered_shards()) / self._num_shards()
        if answered < 1:
            return PHASES[0], answered / len(PHASES)
        is_fitted = self.phase == PHASES[2] or (self.model.resources.workers == 1 and self.folder.sums_files())
        number = 2 if is_fitted else 1
        return PHASES[number], number / len(PHASES)

    def row(self) -> dict[str, Any]:
        """What ``sweep.json`` and the table say of it."""
        config = self.model.calibration
        status = self.status or STOPPED
        done = (self.folder.done() or {}) if status in (OK, KEPT) else {}
        return {
            "name": self.model.name,
            "model": config.model,
            "status": status,
            "phase": self.phase if status in (FAILED, STOPPED) else None,
            "error": self.error,
            "checkpoint": config.output,
            **done,
            "resources": {**self.model.resources.model_dump(mode="json"), "num_gpus": self.num_gpus},
            "nodes": self.nodes,
        }

    def _task(self, phases: Sequence[str], task_shards: Sequence[int] | None = None) -> Task:
        return Task(
            model=self.model,
            folder=self.folder,
            prompts=self.inputs.file,
            num_gpus=self.num_gpus,
            phases=tuple(phases),
            shards=None if task_shards is None else tuple(task_shards),
        )

    def _shared(self, phase: str, missing: Sequence[int]) -> list[Task]:
        workers = min(self.model.resources.workers, len(missing))
        return [self._task([phase], missing[number::workers]) for number in range(workers)]

    def _num_shards(self) -> int:
        return len(shards(self.inputs.num_items)) if self.inputs.file else 1

    def _is_in_place(self, identity: str) -> bool:
        try:
            return routers_identity(os.fspath(self.model.calibration.output)) == identity
        except UserError:
            return False
