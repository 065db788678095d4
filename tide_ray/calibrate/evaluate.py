"""Evaluation of a checkpoint on given prompts, through the engine itself and against full depth.

Disagreement is the certified quantity: the share of a prompt's answer tokens where a setting, made to follow full
depth's answer, would choose another; its mean over prompts. The engine also answers by itself, which tells how many
answers stay the same, where they part, and with an answer column whether they are right. Every boundary is on, whether
it saves time or not. Baselines run the same set of layers for every token, at the least mean depth of a setting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tide_ray.calibrate.config import EvaluationConfig
from tide_ray.calibrate.corpus import Progress
from tide_ray.calibrate.follow import answer, follow, interval
from tide_ray.calibrate.unseen import load_for, unseen_rows
from tide_ray.config import EngineConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.requests import PromptEncoder
from tide_ray.exits.certificates import pick
from tide_ray.exits.checkpoint import Routers
from tide_ray.models.load import LoadedModel
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
            "max_model_len": max(map(len, self.prompts)) + config.max_tokens,
            "kv_memory_fraction": 0.15,
            "num_threads": config.num_threads,
            "prefix_caching": False,
        }

    def run(self, variants: dict[str, dict[str, Any]], expected: Sequence[object]) -> dict[str, Any]:
        config = self.config
        self.expected = None if any(one is None for one in expected) else expected
        full = TideEngine(self.loaded, EngineConfig(**self.settings))
        self.progress("full depth answers the prompts", 0.0)
        self.full = answer(full, self.prompts, config.max_tokens)
        full.runner.pools.release()
        again = TideEngine(self.loaded, EngineConfig(**{**self.settings, "max_num_seqs": FLOOR_SEQS}))
        self.progress("full depth again", 0.0)
        rows: list[dict[str, Any]] = [
            {"name": "full depth", "mean_depth": full.num_layers, **self._correctness(self.full)},
            {"name": "full depth again", **self._disagreement(follow(again, self.prompts, self.full))},
        ]
        again.runner.pools.release()
        for name, options in variants.items():
            rows.append(self._evaluated(name, {**options, "exits": config.routers, "exits_when": "always"}))
        if config.baselines:
            depth = min(row["mean_depth"] for row in rows[2:])
            for name, options in (
                ("every token stops at one depth", {"exit_layer": min(max(1, round(depth)), full.num_layers - 1)}),
                ("layers skipped evenly", {"static_cost": depth / full.num_layers}),
            ):
                rows.append(self._evaluated(name, {**options, "policy": "static"}))
        return {
            "model": self.loaded.source,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "boundaries": list(self.routers.depths),
            "kv_policy": self.routers.facts.kv_policy,
            "certificates": [c.to_json() for c in self.routers.certificates],
            "certification": self.routers.certification,
            "prompts": len(self.prompts),
            "sources": [Path(source).name for source in config.prompts],
            "skip": config.skip,
            "max_tokens": config.max_tokens,
            "variants": rows,
        }

    def _evaluated(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        self.progress(name, 0.0)
        engine = TideEngine(self.loaded, EngineConfig(**{**self.settings, **options}))
        same = follow(engine, self.prompts, self.full)
        self.progress(name, 0.5)
        stats, layers = engine.stats, engine.num_layers
        depth = stats.sum_exit_layers / stats.num_generated_tokens
        runs = sum(stats.rows_through_layer)
        facts = {
            "name": name,
            **self._disagreement(same),
            "mean_depth": round(depth, 3),
            "ceiling_in_layers": round(layers * max(stats.rows_through_layer) / runs, 3),
            "prompt_rows_stopped": round(stats.num_prefill_exits / max(stats.num_prompt_tokens, 1), 4),
        }
        free = answer(engine, self.prompts, self.config.max_tokens)
        partings = [_parting(ours, theirs) for ours, theirs in zip(free, self.full, strict=True)]
        parted = [at for at in partings if at is not None]
        engine.runner.pools.release()
        return {
            **facts,
            "identical_answers": interval([at is None for at in partings]),
            "median_first_divergence": float(np.median(parted)) if parted else None,
            **self._correctness(free),
        }

    def _disagreement(self, same: Sequence[Sequence[bool]]) -> dict[str, Any]:
        return {"disagreement": interval([1 - float(np.mean(one)) for one in same if one])}

    def _correctness(self, answers: Sequence[list[int]]) -> dict[str, Any]:
        if self.expected is None or self.loaded.tokenizer is None:
            return {}
        texts = [str(self.loaded.tokenizer.decode(one, skip_special_tokens=True)) for one in answers]
        right = [is_right(text, wanted) for text, wanted in zip(texts, self.expected, strict=True)]
        return {"right_answers": interval(right)}


def _parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Number of the first token that differs; None: none does."""
    if list(ours) == list(theirs):
        return None
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
