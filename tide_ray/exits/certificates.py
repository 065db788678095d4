"""Certificates: exit settings whose disagreement with full depth is bounded, and for what the bound holds.

They are part of a router checkpoint's JSON, one for each epsilon and loss. A checkpoint may have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tide_ray.types import SamplingParams, UserError

VERSION = 1
NEVER = math.inf

_PLAIN = SamplingParams(temperature=0.0)
_MUST_BE_PLAIN = ("temperature", "repetition_penalty", "min_tokens", "ignore_eos", "exit_threshold", "exit_min_depth")
"""What of a request's parameters changes which tokens are chosen, when answers end or who exits."""


@dataclass(frozen=True, slots=True)
class ExitSetting:
    """Everything that decides who exits.

    ``thresholds``: gate score from which a token exits, for each boundary; infinite: none does. ``prefill_threshold``:
    predicted damage below which a prompt token stops, at every boundary; None: prompts run every layer.
    """

    thresholds: tuple[float, ...]
    prefill_threshold: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A setting and what was shown of it.

    ``epsilon``: bound on the expected loss of a prompt; ``delta``: chance, over the certification prompts, that the
    bound does not hold; ``loss``: what is bounded, of ``config.LOSSES``. ``thresholds`` (None: no exits
    there), ``prefill_threshold``: as in ExitSetting, with the last ``prefill_tail`` prompt tokens always running every
    layer. ``p_value_kind``, ``p_value``: of the setting, at ``epsilon``; None where nothing was certified but full
    depth. ``num_prompts``: that it was tested on, with ``num_ordering_prompts`` others to order the settings;
    ``num_tested``: settings tested. ``mean_loss``, ``exit_share`` (of generated tokens), ``prefill_exit_share`` (of
    prompt tokens), ``saving`` (share of layer runs): means on the certification prompts. ``noise_floor``: what full
    depth's tokens disagree with themselves when rows are batched in another way. ``max_tokens``: longest answers
    judged. ``fingerprint``: of the checkpoint; ``weights_sha256``: of its weights. ``guarantee``: all this in words.
    """

    epsilon: float
    delta: float
    loss: str
    thresholds: tuple[float | None, ...]
    prefill_threshold: float | None
    prefill_tail: int
    p_value_kind: str
    p_value: float | None
    num_prompts: int
    num_ordering_prompts: int
    num_tested: int
    mean_loss: float
    exit_share: float
    prefill_exit_share: float
    saving: float
    noise_floor: float
    max_tokens: int
    sources: tuple[str, ...]
    fingerprint: dict[str, Any]
    weights_sha256: str
    guarantee: str = ""
    version: int = VERSION

    @property
    def setting(self) -> ExitSetting:
        """Its thresholds; those of boundaries where nothing exits are out of reach."""
        return ExitSetting(tuple(NEVER if t is None else t for t in self.thresholds), self.prefill_threshold)

    @property
    def has_exits(self) -> bool:
        """Whether anything stops early under it; else it certifies full depth, which needs no proof."""
        return self.prefill_threshold is not None or any(t is not None for t in self.thresholds)

    def with_setting(self, setting: ExitSetting) -> Certificate:
        """The same certificate for another setting."""
        thresholds = tuple(None if t == NEVER else t for t in setting.thresholds)
        return replace(self, thresholds=thresholds, prefill_threshold=setting.prefill_threshold)

    def check_request(self, params: SamplingParams) -> None:
        """Refuse a request for which the certificate would not hold. Full depth (``exit_policy``) it may ask for.

        Raises:
            UserError: naming the first parameter that differs from what was certified.
        """
        if params.exit_policy == "full":
            return
        for name in _MUST_BE_PLAIN:
            value, certified = getattr(params, name), getattr(_PLAIN, name)
            if value != certified:
                raise UserError(f"{name}: max_disagreement is certified for {certified!r} only, got {value!r}")
        if params.exit_policy not in (None, "router"):
            raise UserError(f"exit_policy: max_disagreement is certified for 'router' only, got {params.exit_policy!r}")
        if params.max_tokens is None or params.max_tokens > self.max_tokens:
            raise UserError(
                f"max_tokens: max_disagreement is certified for answers of up to {self.max_tokens} tokens, "
                f"got {params.max_tokens}"
            )

    def to_json(self) -> dict[str, Any]:
        """All fields, as values that JSON has; ``from_json`` reads them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Certificate:
        """Raises KeyError, TypeError or ValueError for anything but a certificate of this version."""
        if raw.get("version") != VERSION:
            raise ValueError(f"a certificate of version {raw.get('version')!r}, known is {VERSION}")
        values = {f.name: raw[f.name] for f in fields(cls)}
        thresholds = tuple(None if t is None else float(t) for t in values.pop("thresholds"))
        return cls(thresholds=thresholds, sources=tuple(values.pop("sources")), **values)


def pick(certificates: Sequence[Certificate], max_disagreement: float, loss: str = "tokens") -> Certificate:
    """The certificate of ``loss`` with the largest epsilon that is not above ``max_disagreement``.

    Raises:
        UserError: there is none.
    """
    of_loss = [c for c in certificates if c.loss == loss]
    fitting = [c for c in of_loss if c.epsilon <= max_disagreement or math.isclose(c.epsilon, max_disagreement)]
    if fitting:
        return max(fitting, key=lambda c: c.epsilon)
    known = ", ".join(f"{c.epsilon:g}" for c in of_loss) or "none; tide-ray certify adds them"
    raise UserError(
        f"max_disagreement: the checkpoint has no certificate of {loss} for it ({known}), got {max_disagreement!r}"
    )


def guarantee_text(certificate: Certificate) -> str:
    """The guarantee in plain words."""
    c = certificate
    if not c.has_exits:
        return (
            f"No setting with early exits was certified at {c.epsilon:g}: every token runs full depth, which does not "
            "disagree with itself."
        )
    what = {
        "tokens": (
            f"the model's choice differs from full depth's in at most {c.epsilon:.2%} of an answer's tokens, on "
            "average over prompts (each judged after full depth's own tokens, against full depth in the same launch)"
        ),
        "answers": f"at most {c.epsilon:.2%} of the answers differ from full depth's",
        "task": f"the task loss is at most {c.epsilon:g} worse than full depth's, on average over prompts",
    }[c.loss]
    return (
        f"With probability of at least {1 - c.delta:.0%} over the {c.num_prompts:,} certification prompts, {what}. "
        f"It holds for greedy answers of up to {c.max_tokens} tokens to prompts of the same kind, with this model and "
        f"checkpoint in {c.fingerprint['dtype']} and K/V policy {c.fingerprint['kv_policy']}; boundaries that are off "
        "because they would not save time let tokens run deeper, which is taken to do no harm. Full depth itself "
        f"differs in {c.noise_floor:.2%} of the tokens when rows are batched in another way."
    )
