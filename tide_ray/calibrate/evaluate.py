"""Evaluation of a checkpoint on given prompts, through the engine itself and against full depth.

Disagreement is the certified quantity: the share of a prompt's answer tokens where a setting, made to follow full
depth's answer, would choose another; its mean over prompts. The engine also answers by itself, which tells how many
answers stay the same, where they part, and with an answer column whether they are right; and it follows a text, whose
perplexity over full depth's is told. Every boundary is on, whether it saves time or not. Speed is measured while
following, so that both run the same tokens: full depth and a setting in turn. Other rules run at the cost of the
cheapest setting (see ``baselines``).
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tide_ray.calibrate.baselines import MIN_EXIT_SHARE, Scores, fixed_layers, prefill_share_of, stopping_rules
from tide_ray.calibrate.config import EvaluationConfig
from tide_ray.calibrate.corpus import Example, Progress, paragraphs
from tide_ray.calibrate.follow import answer, follow, follow_text
from tide_ray.calibrate.intervals import exact_interval, interval, median_interval
from tide_ray.calibrate.unseen import load_for, unseen_rows
from tide_ray.config import EngineConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.requests import PromptEncoder
from tide_ray.exits.certificates import pick
from tide_ray.exits.checkpoint import Routers
from tide_ray.models.loading import LoadedModel
from tide_ray.types import Prompt, UserError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FLOOR_SEQS = 24
"""Residents of full depth's second run, whose batches are other ones."""


def evaluate(config: EvaluationConfig, progress: Progress = lambda _what, _share: None) -> dict[str, Any]:
    """Evaluate a checkpoint; returns the facts that are printed and written.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    routers = Routers.load(config.routers)
    rows = unseen_rows(config, routers, also=(config.answer_column,))
    variants = _variants(config, routers)
    progress("loading the model", 0.0)
    loaded = load_for(config, routers)
    return _Evaluation(config, routers, loaded, [row[0] for row in rows], progress).run(
        variants, [row[1].get(config.answer_column) for row in rows]
    )


def is_right(text: str, expected: object) -> bool:
    """Whether the last number in an answer is the last one of the expected answer, as GSM8K is marked; without numbers
    there, whether the texts are equal."""
    wanted = last_number(str(expected))
    return text.strip() == str(expected).strip() if wanted is None else last_number(text) == wanted


def last_number(text: str) -> float | None:
    """The last number in a text, thousands separators dropped."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _variants(config: EvaluationConfig, routers: Routers) -> dict[str, dict[str, Any]]:
    """Engine settings by name. Raises UserError when there is nothing to evaluate."""
    asked = config.max_disagreements or [c.epsilon for c in routers.certificates if c.loss == "tokens"]
    variants: dict[str, dict[str, Any]] = {
        f"certified {epsilon:g}": {
            "max_disagreement": epsilon,
            "prefill_tail": pick(routers.certificates, epsilon).prefill_tail,
        }
        for epsilon in sorted(asked)
    }
    variants |= {f"exit error {error:g}": {"exit_error": error} for error in config.exit_errors}
    if not variants:
        raise UserError("max_disagreements: the checkpoint has no certificates; give exit_errors, or certify it first")
    return variants


class _Evaluation:
    def __init__(
        self,
        config: EvaluationConfig,
        routers: Routers,
        loaded: LoadedModel,
        prompts: Sequence[Prompt],
        progress: Progress,
    ) -> None:
        self.config = config
        self.routers = routers
        self.loaded = loaded
        self.progress = progress
        encoder = PromptEncoder(loaded.tokenizer, loaded.model.config.get_text_config().vocab_size)
        self.prompts = [encoder.encode(prompt)[1] for prompt in prompts]
        self.settings: dict[str, Any] = {
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": max(map(len, self.prompts)) + config.max_tokens + 1,
            "kv_memory_fraction": 0.15,
            "num_threads": config.num_threads,
            "prefix_caching": False,
        }

    def run(self, variants: dict[str, dict[str, Any]], expected: Sequence[object]) -> dict[str, Any]:
        config = self.config
        self.expected = None if any(one is None for one in expected) else expected
        self.engine = TideEngine(self.loaded, EngineConfig(**self.settings))
        self.texts = self._texts()
        self.engine.warm_up()
        self.progress("full depth answers the prompts", 0.0)
        self.full = answer(self.engine, self.prompts, config.max_tokens)
        self.full_text = follow_text(self.engine, self.texts) if self.texts else []
        again = TideEngine(self.loaded, EngineConfig(**{**self.settings, "max_num_seqs": FLOOR_SEQS}))
        self.progress("full depth again", 0.0)
        full_row = {"name": "full depth", "mean_depth": self.engine.num_layers, "mean_cost": 1.0, "speed": [1.0] * 3}
        floor = _disagreement(follow(again, self.prompts, self.full))
        again.runner.pools.release()
        rows = []
        for name, options in variants.items():
            options = {**options, "exits": config.routers}
            rows.append({**self._evaluated(name, options), "speed_in_jobs": self._speed_in_jobs(name, options)})
        facts: dict[str, Any] = {}
        if config.baselines:
            cheapest = min(rows, key=lambda row: row["mean_cost"])
            others, left_out = self._baselines(cheapest, variants[cheapest["name"]])
            facts = {"baselines": {"at_the_cost_of": cheapest["name"], "left_out": left_out}}
            rows += [{**self._evaluated(name, options), "is_baseline": True} for name, options in others.items()]
        return {
            "model": self.loaded.source,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "boundaries": list(self.routers.depths),
            "kv_policy": self.routers.facts.kv_policy,
            "certificates": [c.to_json() for c in self.routers.certificates],
            "certification": self.routers.certification,
            "prompts": len(self.prompts),
            "sources": [Path(source).name for source in config.prompts],
            "text": Path(config.text).name if config.text else None,
            "paragraphs": len(self.texts),
            "skip": config.skip,
            "max_tokens": config.max_tokens,
            "rounds": config.rounds,
            **facts,
            "variants": [
                {**full_row, **self._correctness(self.full)},
                {"name": "full depth again", "disagreement": floor},
                *rows,
            ],
        }

    def _texts(self) -> list[list[int]]:
        """Paragraphs, none of which has a token that ends answers before its last."""
        if self.config.text is None:
            return []
        ends = set(self.loaded.eos_token_ids)
        found = paragraphs(self.config.text, self.engine, self.config.max_tokens + 1)
        texts = list(itertools.islice((ids for ids in found if not ends & set(ids[1:-1])), self.config.num_paragraphs))
        if not texts:
            raise UserError(f"text: it has no paragraph that is long enough, got {self.config.text!r}")
        return texts

    def _baselines(
        self, setting: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Engine settings of rules at the cost of ``setting``, by name, and why the others are left out."""
        num_layers, depths = self.engine.num_layers, self.routers.depths
        if setting["mean_cost"] >= 1:
            return {}, {"all": "no setting lets anything stop"}
        rules = fixed_layers(setting["mean_cost"], num_layers)
        num_tokens, num_asked = sum(map(len, self.full)), sum(len(one) - 1 for one in self.full)
        share = setting["exit_share"] * num_tokens / num_asked if num_asked else 0.0
        if share < MIN_EXIT_SHARE:
            names = ("confidence", "capacity", "post hoc")
            return rules, dict.fromkeys(names, "the setting lets prompt tokens stop only, or next to nothing")
        # An answer's first token is read from the prompt's last row, which no rule is asked about.
        asked_depth = num_layers - (num_layers - setting["mean_depth"]) * num_tokens / num_asked
        self.progress("scores at full depth", 0.0)
        adapter = self.engine.runner.adapter
        boundaries = [one.ready(adapter.device, adapter.dtype) for one in Routers.load(self.config.routers).boundaries]
        examples = [
            Example([*prompt, *own[:-1]], len(prompt) - 1, own[-1])
            for prompt, own in zip(self.prompts, self.full, strict=True)
        ]
        prompt_exits: dict[str, Any] = {}
        if "max_disagreement" in options:
            certificate = pick(self.routers.certificates, options["max_disagreement"])
            prefill_share = prefill_share_of(self.routers.boundaries[-1], certificate.prefill_threshold)
            prompt_exits = {"prefill_share": prefill_share, "prefill_tail": certificate.prefill_tail}
        scores = Scores(adapter, boundaries, examples)
        others = stopping_rules(scores, depths, num_layers, asked_depth, prompt_exits)
        return rules | {name: {**one, "exits": self.config.routers} for name, one in others.items()}, {}

    def _evaluated(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """A row of the table: a setting's figures."""
        if "exits" in options:
            options = {**options, "exits_when": "always"}
        engine = TideEngine(self.loaded, EngineConfig(**{**self.settings, **options}))
        engine.warm_up()
        speed, same = self._followed(name, engine)
        stats, layers = engine.stats, engine.num_layers
        cost = sum(stats.rows_through_layer) / (layers * _rows_run(engine))
        num_exits = stats.num_generated_tokens - stats.tokens_at_depth.get(layers, 0)
        facts = {
            "name": name,
            "disagreement": _disagreement(same),
            "mean_depth": round(stats.sum_exit_layers / stats.num_generated_tokens, 3),
            "exit_share": round(num_exits / stats.num_generated_tokens, 5),
            "prompt_rows_stopped": round(stats.num_prefill_exits / max(stats.num_prompt_tokens, 1), 4),
            "mean_cost": round(cost, 5),
            "ceiling_in_layers": round(1 / cost, 3),
            "speed": speed,
        }
        facts |= self._perplexity(engine)
        free = answer(engine, self.prompts, self.config.max_tokens)
        partings = [_parting(ours, theirs) for ours, theirs in zip(free, self.full, strict=True)]
        parted = [at for at in partings if at is not None]
        engine.runner.pools.release()
        return {
            **facts,
            "identical_answers": exact_interval([at is None for at in partings]),
            "first_divergence": median_interval(parted) if parted else None,
            **self._correctness(free),
        }

    def _speed_in_jobs(self, name: str, options: dict[str, Any]) -> list[float]:
        """The setting's speed where boundaries that do not pay are off, as they are by default."""
        engine = TideEngine(self.loaded, EngineConfig(**{**self.settings, **options}))
        engine.warm_up()
        speed, _ = self._followed(f"{name}, as in jobs", engine)
        engine.runner.pools.release()
        return speed

    def _followed(self, name: str, engine: TideEngine) -> tuple[list[float], list[list[bool]]]:
        """Speed over full depth, both following full depth's answers in turn, and which tokens the engine chose too.

        The speed is a median over rounds, with the least and the most.
        """
        ratios: list[float] = []
        for number in range(self.config.rounds):
            self.progress(name, number / (self.config.rounds + 1))
            start = time.perf_counter()
            follow(self.engine, self.prompts, self.full)
            middle = time.perf_counter()
            same = follow(engine, self.prompts, self.full)
            ratios.append((middle - start) / (time.perf_counter() - middle))
        return [round(float(value), 3) for value in (np.median(ratios), min(ratios), max(ratios))], same

    def _perplexity(self, engine: TideEngine) -> dict[str, Any]:
        """Perplexity of the text over full depth's, paragraphs being the unit of its interval."""
        if not self.texts:
            return {}
        followed = follow_text(engine, self.texts)
        counts = [len(one) for one in self.full_text]
        worse = [float(np.mean(theirs) - np.mean(ours)) for ours, theirs in zip(followed, self.full_text, strict=True)]
        return {"perplexity_ratio": [round(math.exp(value), 5) for value in interval(worse, counts)]}

    def _correctness(self, answers: Sequence[list[int]]) -> dict[str, Any]:
        if self.expected is None or self.loaded.tokenizer is None:
            return {}
        texts = [str(self.loaded.tokenizer.decode(one, skip_special_tokens=True)) for one in answers]
        right = [is_right(text, wanted) for text, wanted in zip(texts, self.expected, strict=True)]
        return {"right_answers": exact_interval(right)}


def _rows_run(engine: TideEngine) -> int:
    """Rows that entered the model: layers skipped by a fixed rule see none of them."""
    return max(engine.stats.rows_through_layer)


def _disagreement(same: Sequence[Sequence[bool]]) -> list[float]:
    return interval([1 - float(np.mean(one)) for one in same if one])


def _parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Number of the first token that differs; None: none does."""
    if list(ours) == list(theirs):
        return None
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
