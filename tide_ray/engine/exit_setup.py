"""From a router checkpoint and the configuration to what the engine runs: boundaries, policy, rules for a request."""

from __future__ import annotations

import math
from typing import Any

from tide_ray.config import DEFAULT_EXIT_ERROR, EngineConfig
from tide_ray.engine.boundaries import BoundaryExits
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.kv_fill import KVFill
from tide_ray.engine.measure import measure_costs
from tide_ray.engine.planner import LaunchPlanner
from tide_ray.engine.runner import Runner
from tide_ray.engine.sequence import NO_EXITS, ExitRules
from tide_ray.exits.certificates import Certificate, pick
from tide_ray.exits.checkpoint import Boundary, Routers, fingerprint_of
from tide_ray.exits.policies import CapacityExits, ExitPolicy, ScoredExits, Scorer
from tide_ray.exits.rotary import find_rotary
from tide_ray.models.adapter import Adapter
from tide_ray.models.loading import LoadedModel
from tide_ray.types import EngineStats, SamplingParams, UserError

NEVER = math.inf
_OF_THE_ENGINE = SamplingParams(temperature=0, max_tokens=1)
"""Stands for a request without wishes of its own."""


def load_routers(config: EngineConfig, model: LoadedModel, adapter: Adapter) -> Routers | None:
    """The checkpoint that ``config`` names, ready for inference; None when it names none.

    Raises:
        UserError: it is damaged, or was made for something else.
    """
    if config.exits is None:
        return None
    routers = Routers.load(config.exits)
    routers.check_made_for(
        fingerprint_of(
            model,
            kv_policy=(config.kv_policy if config.mode == "exits" else None) or routers.facts.kv_policy,
            num_layers=adapter.num_layers,
            hidden_size=adapter.config.hidden_size,
        )
    )
    return routers


def install_exits(config: EngineConfig, routers: Routers, runner: Runner, max_num_seqs: int) -> None:
    """Give the runner its boundaries, and a planner with the costs of this machine.

    Raises:
        UserError: the checkpoint lacks something that the configuration asks for.
    """
    exits = build_exits(config, routers, runner.adapter, runner.pools, runner.stats)
    rules = exit_rules(config, routers, _OF_THE_ENGINE)
    shares = [b.exit_share(t) for b, t in zip(routers.boundaries, rules.thresholds, strict=True)]
    if config.capacity is not None:
        shares = [1 - config.capacity] * len(shares)
    # Where states are only selected every layer runs, so no plan could save anything.
    costs = None if exits.kv_policy == "full" else measure_costs(runner, exits, max_num_seqs)
    runner.exits = exits
    acceptance = 1 - (config.exit_error or DEFAULT_EXIT_ERROR) if exits.verifies else None
    runner.planner = LaunchPlanner(costs, shares, always=config.exits_when == "always", acceptance=acceptance)


def describe_exits(config: EngineConfig, routers: Routers | None, runner: Runner) -> dict[str, Any] | None:
    """Facts for run records: the checkpoint, the settings, and what the planner makes of them now."""
    exits, planner = runner.exits, runner.planner
    if routers is None or exits is None or planner is None:
        return None
    thresholds = exit_rules(config, routers, _OF_THE_ENGINE).thresholds
    certificate = certificate_of(config, routers)
    return {
        "routers": routers.identity,
        "boundaries": list(routers.depths),
        "thresholds": [None if math.isinf(threshold) else threshold for threshold in thresholds],
        "kv_policy": exits.kv_policy,
        "prefill_thresholds": exits.prefill_thresholds,
        "certificate": None if certificate is None else certificate.to_json(),
        "mode": config.mode,
        "acceptance": None if planner.acceptance is None else round(planner.acceptance, 4),
        "exits_when": config.exits_when,
        "exit_shares": [round(share, 4) for share in planner.shares],
        "boundaries_on": list(planner.current.is_on),
        "holds": list(planner.current.holds),
        "time_factors": [round(factor, 3) for factor in planner.time_factors],
        "switches": planner.num_switches,
        "trials": [] if planner.comparison is None else planner.comparison.to_json(),
        "is_stopped": planner.is_stopped,
    }


def describe_costs(runner: Runner) -> dict[str, Any] | None:
    """What launches were measured to cost at start-up, for run records; None where nothing was measured."""
    return None if runner.planner is None or runner.planner.costs is None else runner.planner.costs.to_json()


def build_exits(
    config: EngineConfig, routers: Routers, adapter: Adapter, pools: KVCache, stats: EngineStats
) -> BoundaryExits:
    """Boundaries with the configured exit policy and KV policy.

    Raises:
        UserError: the checkpoint lacks something that the configuration asks for.
    """
    kv_policy = config.kv_policy or routers.facts.kv_policy
    if config.resolved_policy == "posthoc":
        kv_policy = "full"
    if config.mode == "verified":
        kv_policy = "deferred"  # every position runs every layer in the end, whatever thresholds were calibrated with
    routers.boundaries[:] = [boundary.ready(adapter.device, adapter.dtype) for boundary in routers.boundaries]
    kinds = find_rotary(adapter)
    has_fitted = kinds is not None and all(boundary.kv_head is not None for boundary in routers.boundaries)
    if kv_policy == "fitted" and not has_fitted:
        raise UserError("kv_policy: this checkpoint has no KV heads for this model, got 'fitted'")
    prefill: list[float | None] = [None] * len(routers.boundaries)
    certificate = certificate_of(config, routers)
    if certificate is not None:
        prefill = [certificate.prefill_threshold] * len(prefill)
    if config.prefill_share is not None:
        if not has_fitted or not all(b.prefill_gate is not None and b.prefill_quantiles for b in routers.boundaries):
            raise UserError(f"prefill_share: this checkpoint has no prefill gate, got {config.prefill_share!r}")
        # Damage has one unit at all boundaries, so that a token stops where it first is small enough.
        prefill = [routers.boundaries[-1].prefill_threshold(config.prefill_share)] * len(prefill)
    return BoundaryExits(
        routers.boundaries,
        _policy(config, routers.boundaries, adapter),
        KVFill(adapter, pools, routers.boundaries, kinds if has_fitted else None),
        stats,
        kv_policy=kv_policy,
        prefill_thresholds=prefill,
        verifies=config.mode == "verified",
    )


def _policy(config: EngineConfig, boundaries: list[Boundary], adapter: Adapter) -> ExitPolicy:
    scorer = Scorer(boundaries, adapter.final_norm, adapter.head, config.confidence_measure)
    return ScoredExits(scorer) if config.capacity is None else CapacityExits(scorer, config.capacity)


def exit_rules(config: EngineConfig, routers: Routers | None, params: SamplingParams) -> ExitRules:
    """When the tokens of a request may exit: the engine's settings with the request's own over them.

    Raises:
        UserError: the request asks for what this engine does not have.
    """
    if routers is None:
        for name in ("exit_threshold", "exit_min_depth", "exit_policy", "max_disagreement"):
            value = getattr(params, name)
            if value is not None and (name, value) != ("exit_policy", "full"):
                raise UserError(f"{name} needs an engine with exits (a router checkpoint), got {value!r}")
        return NO_EXITS
    of_engine = certificate_of(config, routers)
    certificate = of_engine if params.max_disagreement is None else _asked_for(config, routers, params.max_disagreement)
    if certificate is not None:
        certificate.check_request(params)
        if params.exit_policy == "full":
            return ExitRules((NEVER,) * len(routers.boundaries))
        setting = certificate.setting
        # Where prompt tokens stop is the engine's: under another certificate prompts run every layer, which is taken to
        # do no harm, like boundaries that are off.
        shares_prefill = of_engine is not None and of_engine.setting.prefill_threshold == setting.prefill_threshold
        return ExitRules(setting.thresholds, prompt_exits=shares_prefill and setting.prefill_threshold is not None)
    policy = params.exit_policy or ("router" if config.policy == "auto" else config.policy)
    min_depth = config.exit_min_depth if params.exit_min_depth is None else params.exit_min_depth
    given = config.exit_threshold if params.exit_threshold is None else params.exit_threshold
    if policy == "confidence" and given is None:
        raise UserError("exit_policy 'confidence' needs exit_threshold, got none")
    thresholds = []
    for boundary in routers.boundaries:
        if policy == "full" or boundary.depth < min_depth:
            thresholds.append(NEVER)
        else:
            thresholds.append(calibrated_threshold(boundary, config.exit_error) if given is None else given)
    # The engine's own policy may be full with a prefill share; a request that asks for full means its prompt as well.
    prompt_exits = config.prefill_share is not None and params.exit_policy != "full"
    return ExitRules(tuple(thresholds), "confidence" if policy == "confidence" else "router", prompt_exits)


def _asked_for(config: EngineConfig, routers: Routers, max_disagreement: float) -> Certificate:
    if config.policy not in ("auto", "router", "full"):
        raise UserError(f"max_disagreement needs an engine of policy 'router', got policy {config.policy!r}")
    return pick(routers.certificates, max_disagreement, config.certified_loss)


def certificate_of(config: EngineConfig, routers: Routers | None) -> Certificate | None:
    """The certificate that the configuration asks for; None when it asks for none.

    Raises:
        UserError: there is none for it, or the configuration differs from what was certified.
    """
    if config.max_disagreement is None or routers is None:
        return None
    certificate = pick(routers.certificates, config.max_disagreement, config.certified_loss)
    if certificate.prefill_threshold is not None and config.prefill_tail != certificate.prefill_tail:
        raise UserError(
            f"prefill_tail: max_disagreement is certified for {certificate.prefill_tail}, got {config.prefill_tail}"
        )
    return certificate


def calibrated_threshold(boundary: Boundary, error: float | None) -> float:
    """The checkpoint's threshold for an error level.

    Raises:
        UserError: the level was not calibrated.
    """
    level = DEFAULT_EXIT_ERROR if error is None else error
    for name, threshold in boundary.thresholds.items():
        if math.isclose(float(name), level):
            return threshold
    known = ", ".join(boundary.thresholds) or "none"
    raise UserError(f"exit_error must be a calibrated level ({known}), got {level!r}")
