"""Settings of calibration and of certification; flags, YAML and Python build the same objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tide_ray.calibrate.certify_pvalues import KINDS
from tide_ray.config import LOSSES, check_choice
from tide_ray.data.job_config import validated
from tide_ray.types import UserError


class Settings(BaseModel):
    """What flags, YAML and Python may set, checked as it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Validate user-given values. Raises UserError for an unknown name or a bad value."""
        return validated(cls, values)


class CalibrationConfig(Settings):
    """What to calibrate, on what, and where the router checkpoint goes. Without ``prompts`` and ``text``: the bundled
    demo prompts."""

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

    @model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        if self.prompts and self.text:
            raise UserError(f"calibration takes prompts or text, got both: {self.prompts} and {self.text!r}")
        return self


class CheckpointPrompts(Settings):
    """A router checkpoint and prompts that it has not seen. What is None is as it was for calibration."""

    routers: str = Field(min_length=1, description="folder of the router checkpoint")
    prompts: list[str] = Field(default_factory=list, description="files, folders or data sets nothing was fitted to")
    prompt_column: str | None = Field(default=None, description="column that holds the prompts")
    skip: int = Field(default=0, ge=0, description="leave out this many prompts at the start, such as calibration's")
    num_prompts: int | None = Field(default=None, ge=1, description="use only this many prompts after those")
    max_tokens: int = Field(default=128, ge=1, description="most tokens per answer")
    raw: bool | None = Field(default=None, description="use string prompts as they are, without the chat template")
    model: str | None = Field(default=None, description="hub id, folder, .gguf file or 'demo'")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: str | None = Field(default=None, description="auto, float32, bfloat16 or float16")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="run modelling code that comes with the weights")
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads")


class CertificationConfig(CheckpointPrompts):
    """Which checkpoint to certify, on which prompts, and how strictly. Certificates hold for up to ``max_tokens``."""

    num_ordering: int = Field(default=100, ge=8, description="prompts that order the settings and test none")
    epsilons: list[float] = Field(default=[0.01, 0.02, 0.05], description="bounds on the loss to certify")
    delta: float = Field(default=0.05, gt=0, lt=1, description="chance that a certificate does not hold")
    loss: str = Field(default="tokens", description=f"what is bounded: {', '.join(LOSSES)} (task: from Python)")
    p_value: str | None = Field(default=None, description=f"{', '.join(KINDS)}; default: wsr, of answers binomial")
    prefill: bool = Field(default=True, description="let prompt tokens stop, too, where the checkpoint can")
    prefill_tail: int = Field(default=32, ge=0, description="last prompt tokens that always run every layer")
    seed: int = Field(default=0, description="of the order of the prompts")

    @property
    def p_value_kind(self) -> str:
        """``p_value`` with its default decided."""
        return self.p_value or ("binomial" if self.loss == "answers" else "wsr")

    @model_validator(mode="after")
    def _check(self) -> CertificationConfig:
        if not self.epsilons or not all(0 < epsilon < 1 for epsilon in self.epsilons):
            raise UserError(f"epsilons must lie between 0 and 1, got {self.epsilons!r}")
        for name, value, known in (("loss", self.loss, LOSSES), ("p_value", self.p_value_kind, KINDS)):
            check_choice(name, value, known)
        if self.p_value_kind == "binomial" and self.loss != "answers":
            raise UserError(f"p_value 'binomial' needs losses of 0 or 1, got loss {self.loss!r}")
        return self


class EvaluationConfig(CheckpointPrompts):
    """Which checkpoint to evaluate, at which settings, and on which prompts."""

    max_disagreements: list[float] = Field(default_factory=list, description="certified settings; default: all")
    exit_errors: list[float] = Field(default_factory=list, description="also thresholds calibrated for these errors")
    baselines: bool = Field(default=True, description="also other rules, at the cost of the cheapest setting")
    text: str | None = Field(default=None, description="text file whose perplexity is compared, a paragraph per line")
    num_paragraphs: int = Field(default=64, ge=1, description="most paragraphs of text")
    rounds: int = Field(default=2, ge=1, description="times that each setting and full depth take turns, for speed")
    answer_column: str = Field(default="answer", description="column with right answers, where there is one")
    max_num_seqs: int = Field(default=64, ge=1, description="resident sequences")
    output: str | None = Field(default=None, description="JSON file for the figures; table and plot lie beside, .html")
