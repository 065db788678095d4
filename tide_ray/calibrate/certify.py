"""Certification: adds certificates to a router checkpoint, from prompts that nothing was fitted to.

The model answers the prompts once, at full depth. On some of them settings are put in order; along this path they are
tested on the others, the safest first, until the first that fails. Each epsilon gets the last setting that passed. All
settings of a group run over the same launches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tide_ray.calibrate.certify_losses import AnswerLosses, TaskLoss, TokenLosses
from tide_ray.calibrate.certify_path import Measured, order_path
from tide_ray.calibrate.certify_pvalues import check_enough, last_certified, p_value
from tide_ray.calibrate.config import CertificationConfig
from tide_ray.calibrate.corpus import Example, Progress, answered
from tide_ray.calibrate.unseen import load_for, unseen_rows
from tide_ray.config import EngineConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.memory import return_freed_memory
from tide_ray.exits.certificates import NEVER, Certificate, ExitSetting, guarantee_text
from tide_ray.exits.checkpoint import FINGERPRINT, Routers, fingerprint_of
from tide_ray.exits.checkpoint_files import add_certificates, weights_sha256
from tide_ray.models.loading import LoadedModel
from tide_ray.types import UserError

GROUP = 5
"""Settings measured together: they share what they have in common, and no more than this many are measured in vain."""


@dataclass(slots=True)
class Certification:
    """What came out. ``tested``: the settings measured, in the order of the path; ``p_values``: theirs, by epsilon."""

    certificates: list[Certificate]
    tested: list[Measured]
    p_values: dict[float, list[float]]
    noise_floor: dict[str, float]
    num_ordering: int
    seconds: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For the checkpoint and for reports."""
        return {
            "noise_floor": {name: round(share, 5) for name, share in self.noise_floor.items()},
            "tested": [
                {
                    "thresholds": [None if t == NEVER else t for t in one.setting.thresholds],
                    "prefill_threshold": one.setting.prefill_threshold,
                    "mean_loss": round(one.risk, 5),
                    "exit_share": round(one.exit_share, 4),
                    "prefill_exit_share": round(one.prefill_exit_share, 4),
                    "saving": round(one.saving, 4),
                    "p_values": {str(epsilon): values[n] for epsilon, values in self.p_values.items()},
                }
                for n, one in enumerate(self.tested)
            ],
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }


def certify(
    config: CertificationConfig,
    progress: Progress = lambda _what, _share: None,
    task_loss: TaskLoss | None = None,
) -> Certification:
    """Certify a checkpoint and save the certificates in it.

    Args:
        task_loss: for the loss ``task``.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    if (config.loss == "task") != (task_loss is not None):
        raise UserError(f"loss 'task' goes with a task_loss function, got loss {config.loss!r}")
    routers = Routers.load(config.routers)
    prompts = [prompt for prompt, _ in unseen_rows(config, routers)]
    check_enough(max(len(prompts) - config.num_ordering, 0), config.epsilons, config.delta, config.p_value_kind)
    started = time.perf_counter()
    progress("loading the model", 0.0)
    loaded = load_for(config, routers)
    engine = TideEngine(loaded, EngineConfig(num_threads=config.num_threads, prefix_caching=False))
    adapter = engine.runner.adapter
    routers.check_made_for(
        fingerprint_of(
            loaded,
            kv_policy=routers.facts.kv_policy,
            num_layers=adapter.num_layers,
            hidden_size=adapter.config.hidden_size,
        )
    )
    by_prompt: dict[int, Example] = {}
    for number, example in answered(engine, prompts, config.max_tokens):
        by_prompt[number] = example
        progress("full depth answers the prompts", len(by_prompt) / len(prompts))
    generated = time.perf_counter()
    engine.runner.pools.release()
    return_freed_memory()
    examples = [
        by_prompt[number] for number in sorted(by_prompt)
    ]  # they came as they ended, which hangs on the machine
    random.Random(config.seed).shuffle(examples)
    run = _Run(config, routers, loaded, engine, examples, progress, task_loss)
    certification = run.certify()
    certification.seconds = {"generate": generated - started, **certification.seconds}
    add_certificates(config.routers, certification.certificates, certification.figures())
    return certification


class _Run:
    """One certification: ``examples`` in a random order that does not depend on them."""

    def __init__(
        self,
        config: CertificationConfig,
        routers: Routers,
        loaded: LoadedModel,
        engine: TideEngine,
        examples: Sequence[Example],
        progress: Progress,
        task_loss: TaskLoss | None,
    ) -> None:
        self.config = config
        self.routers = routers
        self.loaded = loaded
        self.ordering, self.test = examples[: config.num_ordering], examples[config.num_ordering :]
        check_enough(len(self.test), config.epsilons, config.delta, config.p_value_kind)
        self.progress = progress
        self.task_loss = task_loss
        adapter = engine.runner.adapter
        routers.boundaries[:] = [boundary.ready(adapter.device, adapter.dtype) for boundary in routers.boundaries]
        self.token_losses = TokenLosses(
            adapter,
            routers.boundaries,
            kv_policy=routers.facts.kv_policy,
            prefill_tail=config.prefill_tail,
            longest=max(len(example.token_ids) for example in examples),
        )

    def certify(self) -> Certification:
        started = time.perf_counter()
        self.progress("measuring the noise floor", 0.0)
        floor = self.token_losses.noise_floor(self.ordering)
        path = order_path(
            self.routers.boundaries,
            self._measure_ordering,
            max_risk=max(self.config.epsilons),
            prefill=self.config.prefill,
        )
        ordered = time.perf_counter()
        tested, p_values = self._test([one.setting for one in path])
        certification = Certification([], tested, p_values, floor, len(self.ordering))
        certification.certificates = [self._certificate(certification, e) for e in sorted(self.config.epsilons)]
        certification.seconds = {"order": ordered - started, "test": time.perf_counter() - ordered}
        return certification

    def _measure_ordering(self, settings: Sequence[ExitSetting]) -> list[Measured]:
        what = f"ordering {len(settings)} settings"
        return self.token_losses.measure(self.ordering, settings, lambda share: self.progress(what, share))

    def _test(self, path: Sequence[ExitSetting]) -> tuple[list[Measured], dict[float, list[float]]]:
        """Measure along the path until no epsilon can go on."""
        config, measure = self.config, self._measure()
        tested: list[Measured] = []
        p_values: dict[float, list[float]] = {epsilon: [] for epsilon in config.epsilons}
        for start in range(0, len(path), GROUP):
            for one in measure(path[start : start + GROUP], _part(self.progress, start, len(path))):
                tested.append(one)
                for epsilon, values in p_values.items():
                    values.append(p_value(one.losses, epsilon, config.delta, config.p_value_kind))
            if all(max(values) > config.delta for values in p_values.values()):
                break
        return tested, p_values

    def _measure(self) -> Callable[[Sequence[ExitSetting], Callable[[float], None]], list[Measured]]:
        config = self.config
        if config.loss == "tokens":
            return lambda settings, progress: self.token_losses.measure(self.test, settings, progress)
        blank = self._blank(1.0, {"launches": 0.0, "generation": 0.0})
        losses = AnswerLosses(
            self.loaded,
            EngineConfig(
                exits=config.routers,
                max_disagreement=1.0,
                certified_loss=config.loss,
                exits_when="always",
                prefill_tail=config.prefill_tail,
                num_threads=config.num_threads,
                prefix_caching=False,
            ),
            blank.with_setting,
            max_tokens=config.max_tokens,
            task_loss=self.task_loss,
        )
        return lambda settings, progress: losses.measure(self.test, settings, progress)

    def _certificate(self, certification: Certification, epsilon: float) -> Certificate:
        values = certification.p_values[epsilon]
        last = last_certified(values, self.config.delta)
        certificate = replace(self._blank(epsilon, certification.noise_floor), num_tested=len(certification.tested))
        if last is not None:
            one = certification.tested[last]
            certificate = replace(
                certificate.with_setting(one.setting),
                p_value=values[last],
                mean_loss=one.risk,
                exit_share=one.exit_share,
                prefill_exit_share=one.prefill_exit_share,
                saving=one.saving,
            )
        return replace(certificate, guarantee=guarantee_text(certificate))

    def _blank(self, epsilon: float, floor: Mapping[str, float]) -> Certificate:
        """A certificate of full depth."""
        config, facts = self.config, self.routers.facts
        return Certificate(
            epsilon=epsilon,
            delta=config.delta,
            loss=config.loss,
            thresholds=(None,) * len(self.routers.boundaries),
            prefill_threshold=None,
            prefill_tail=config.prefill_tail,
            p_value_kind=config.p_value_kind,
            p_value=None,
            num_prompts=len(self.test),
            num_ordering_prompts=len(self.ordering),
            num_tested=0,
            mean_loss=0.0,
            exit_share=0.0,
            prefill_exit_share=0.0,
            saving=0.0,
            noise_floor=max(floor.values()),
            max_tokens=config.max_tokens,
            sources=tuple(Path(source).name for source in config.prompts),
            fingerprint={name: getattr(facts, name) for name in FINGERPRINT},
            weights_sha256=weights_sha256(config.routers),
        )


def _part(progress: Progress, start: int, count: int) -> Callable[[float], None]:
    """Progress of the group of settings from number ``start`` on, of ``count``."""
    size = min(GROUP, count - start)
    return lambda share: progress("testing the settings", (start + share * size) / count)
