"""Settings of a sweep: the models, what each is calibrated with, and the resources that it may take.

``models`` lists models, or mappings with a ``model`` and any setting of ``CalibrationConfig`` and ``Resources``; what
stands beside ``models`` holds for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.data.job_config import first_problem, validated
from tide_ray.data.nodes import check_labels
from tide_ray.types import UserError

MAX_WORKERS = 8
SWEEP_FILE, PAGE_FILE = "sweep.json", "report.html"
"""Beside the models' folders; no model has these names."""
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Resources(BaseModel):
    """What each Ray task of one model sets aside, and where it may run."""

    model_config = _STRICT

    workers: int = Field(default=1, ge=1, le=MAX_WORKERS, description="tasks that share a model's prompts")
    num_gpus: float | None = Field(default=None, ge=0, description="GPUs per task; default: 1 if there are any")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs per task, and CPU threads unless num_threads is given")
    memory: float | None = Field(default=None, gt=0, description="GiB of memory that Ray sets aside per task")
    labels: dict[str, str] = Field(default_factory=dict, description="labels that a task's node must have")

    def options(self, num_gpus: float) -> dict[str, Any]:
        """Options of the Ray task."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": num_gpus}
        if self.memory is not None:
            options["memory"] = int(self.memory * 2**30)
        return options | ({"label_selector": self.labels} if self.labels else {})


_MODEL_FIELDS = [name for name in (*CalibrationConfig.model_fields, *Resources.model_fields) if name != "output"]


class SweepModel(BaseModel):
    """One model of a sweep. ``name`` is its folder in the sweep's output."""

    model_config = _STRICT

    name: str
    calibration: CalibrationConfig
    resources: Resources


class SweepConfig(BaseModel):
    """A sweep: models, where their checkpoints go, and how much of a cluster it may take."""

    model_config = _STRICT

    models: list[SweepModel] = Field(min_length=1, description="models to calibrate")
    output: str = Field(default="./tide-sweep", min_length=1, description="folder with one checkpoint folder per model")
    max_parallel: int | None = Field(default=None, ge=1, description="most tasks that run at once")
    max_cpus: float | None = Field(default=None, gt=0, description="most CPUs that tasks take at once")
    address: str | None = Field(default=None, description="Ray cluster address")
    verbose: bool = Field(default=False, description="show Ray's own logs")

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> SweepConfig:
        """Validate user-given values; see the module.

        Raises:
            UserError: naming the entry, the field and the value.
        """
        _check_names("config", values, [*cls.model_fields, *_MODEL_FIELDS])
        if "models" in values and "model" in values:
            raise UserError(f"model: the sweep has a list of models, got {values['model']!r} beside it")
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        common = {name: value for name, value in values.items() if name in _MODEL_FIELDS and name != "model"}
        entries = own.get("models", [values.get("model", "demo")])
        if not isinstance(entries, list) or not entries:
            raise UserError(f"models must be a list of models, got {entries!r}")
        merged = [{**common, **_entry(number, entry)} for number, entry in enumerate(entries)]
        names = unique_names([str(entry.pop("name", None) or entry["model"]) for entry in merged])
        output = own.get("output", cls.model_fields["output"].default)
        models = [
            _model(f"models[{number}]", name, entry, f"{output}/{name}")
            for number, (name, entry) in enumerate(zip(names, merged, strict=True))
        ]
        sweep = validated(cls, {**own, "models": models})
        if "://" in sweep.output:
            raise UserError(f"output must be a folder that every node can see, got {sweep.output!r}")
        return sweep


def is_sweep(values: Mapping[str, Any]) -> bool:
    """Whether user-given values ask for a sweep rather than one calibration."""
    return any(name in values for name in ({*SweepConfig.model_fields, *Resources.model_fields} - {"output"}))


def unique_names(models: Sequence[str]) -> list[str]:
    """Folder names for models: the last part of each, in plain characters, numbered where it was there before."""
    names: list[str] = []
    for model in models:
        last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-") or "model"
        taken = {SWEEP_FILE, PAGE_FILE, *(name.lower() for name in names)}
        number, name = 1, base
        while name.lower() in taken:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _entry(number: int, entry: object) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"model": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise UserError(f"models[{number}] must be a model, or a mapping with the field model, got {entry!r}")
    return dict(entry)


def _check_names(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{where}: unknown field {name!r}; known: {', '.join(known)}")


def _model(where: str, name: str, values: Mapping[str, Any], output: str) -> SweepModel:
    _check_names(where, values, ["name", *_MODEL_FIELDS])
    resources = {field: value for field, value in values.items() if field in Resources.model_fields}
    calibration = {field: value for field, value in values.items() if field not in resources}
    try:
        made = Resources.model_validate(resources)
        check_labels(made.labels)
        return SweepModel(
            name=name, calibration=CalibrationConfig.build({**calibration, "output": output}), resources=made
        )
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, Resources)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
