"""Settings of a calibration; flags, YAML and Python build the same object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tide_ray.data.job_config import first_problem
from tide_ray.types import UserError


class CalibrationConfig(BaseModel):
    """What to calibrate, on what, and where the router checkpoint goes. Without ``prompts`` and ``text``: the bundled
    demo prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(default="demo", min_length=1, description="hub id, folder, .gguf file or 'demo'")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    prompts: list[str] = Field(default_factory=list, description="files, folders or data sets; the model answers them")
    text: str | None = Field(default=None, description="calibrate on a text file's paragraphs instead of answers")
    prompt_column: str | None = Field(default=None, description="column that holds the prompts")
    num_prompts: int | None = Field(default=None, ge=16, description="use only this many prompts or paragraphs")
    raw: bool = Field(default=False, description="use string prompts as they are, without the chat template")
    output: str = Field(default="./tide-routers", min_length=1, description="folder of the router checkpoint")
    boundaries: list[int] = Field(default_factory=list, description="depths to exit at; default: chosen by saving")
    max_tokens: int = Field(default=128, ge=1, description="most tokens per answer, or per paragraph")
    kv_policy: Literal["fitted", "copy", "deferred"] = Field(default="fitted", description="K/V of skipped layers")
    rank: int | None = Field(default=None, ge=1, description="rank of exit heads; default: full")
    refine: bool = Field(default=True, description="refine exit heads by KL divergence")
    shortlist: int = Field(default=2048, ge=0, le=4096, description="tokens whose logits gates see; 0: none")
    bottleneck: int = Field(default=128, ge=8, le=1024, description="width of the gates")
    seed: int = Field(default=0, description="of the split and of training")
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="run modelling code that comes with the weights")
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads")

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> CalibrationConfig:
        """Validate user-given values. Raises UserError for an unknown name or a bad value."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(first_problem(error, cls)) from None

    @model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        if self.prompts and self.text:
            raise UserError(f"calibration takes prompts or text, got both: {self.prompts} and {self.text!r}")
        return self
