"""What exits are worth in time, apart from quality: a seeded random share of tokens is made to exit at a boundary.

For every number of residents R, full depth with the same R, the exiting engine under several launch policies, and full
depth again take turns; how far its own turns are apart says what a ratio is worth. ``ceiling`` is the speed-up if
skipping were free; ``free_bound`` that of the best launch policy in the cost model at the same R if asking, parting
rows and filling K/V cost nothing; ``bound`` the same at what they were measured to cost. ``realised`` is measured
speed-up over bound, ``realised_of_free`` over the free one.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_shapes import open_model

from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.engine.comparison import FIRST_TRIALS
from tide_ray.engine.cost_model import EngineCosts, LaunchPlan, best_plan, limits
from tide_ray.engine.measure import measure_costs
from tide_ray.engine.planner import LaunchPlanner
from tide_ray.exits.checkpoint import Boundary, Routers, as_facts, fingerprint_of
from tide_ray.exits.gates import Gate
from tide_ray.exits.policies import ForcedExits
from tide_ray.exits.readouts import ExitHead, KVHead
from tide_ray.models import LoadedModel
from tide_ray.models.adapter import KVShape

AGAIN = "full depth, again"
WARM_STEPS = 4
MIN_TOKENS = 128
STAGGER = 40
"""Tokens that sequences prefilled first, or exiting often, may be ahead of the others beside twice the mean."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """``share`` of the tokens exits at ``depth``."""

    depth: int
    share: float

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """``DEPTH:SHARE``, e.g. ``15:0.5``. Raises UserError for anything else."""
        depth, _, share = text.partition(":")
        try:
            parsed = cls(int(depth), float(share))
        except ValueError:
            raise UserError(f"scenarios must be DEPTH:SHARE separated by commas, got {text!r}") from None
        if not 0 < parsed.share <= 1:
            raise UserError(f"scenarios: a share must be in (0, 1], got {text!r}")
        return parsed


class WaitForFull(LaunchPlanner):
    """Survivors wait until half of the residents do, as rebatching with a fixed target batch has it."""

    def __init__(self, share: float) -> None:
        super().__init__(None, [share])
        self.residents = 1

    def plan(self, residents: int) -> LaunchPlan:
        self.residents = residents
        return super().plan(residents)

    def should_launch(self, stage: int, num_ready: int) -> bool:
        return num_ready > 0 and 2 * num_ready >= self.residents


@dataclass(slots=True)
class Contender:
    """An engine with a launch policy; ``prepare`` sets the policy up."""

    name: str
    engine: TideEngine
    prepare: Callable[[], None] = lambda: None
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def speedup(self, full_depth: Sequence[Contender]) -> float:
        """Median ratio to the mean of full depth's turns in the same round: what slows the machine for a while slows
        all of them."""
        means = [statistics.fmean(rates) for rates in zip(*(one.rates for one in full_depth), strict=True)]
        return statistics.median(own / mean for own, mean in zip(self.rates, means, strict=True))


def run_depth(
    *, model: str, dtype: str, scenarios: Sequence[Scenario], residents: Sequence[int], rounds: int, tokens: int,
    min_seconds: float, num_threads: int, prompt_tokens: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Measure every scenario; returns the facts that are printed and written."""
    torch.set_num_threads(num_threads)
    loaded = open_model(model, dtype=dtype)
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    for scenario in scenarios:
        if not 1 <= scenario.depth < num_layers:
            raise UserError(f"scenarios: a depth must be from 1 to {num_layers - 1}, got {scenario.depth}")
    config = EngineConfig(
        dtype=dtype,
        num_threads=num_threads,
        max_num_seqs=max(residents),
        max_model_len=max(prompt_tokens) + max(answer_room(count, tokens) for count in residents),
        kv_memory_fraction=0.45,
        prefix_caching=False,  # every contender computes the same prompts, round after round
    )
    full = TideEngine(loaded, config)
    results = []
    for scenario in scenarios:
        shapes = full.runner.adapter.kv_shapes
        exiting = TideEngine(loaded, config, forced_routers(loaded, scenario.depth, shapes))
        assert exiting.runner.exits is not None
        exiting.runner.exits.policy = ForcedExits([scenario.share])  # costs are those of the policy that will run
        for engine in (full, exiting):
            engine.warm_up()
        rows = []
        for context, cells in itertools.groupby(
            _fitting(exiting, prompt_tokens, residents, tokens), lambda cell: cell[0]
        ):
            costs = measure_costs(exiting.runner, exiting.runner.exits, max(residents), context=context + tokens)
            for _, count in cells:
                prompts = random_prompts(count, full.runner.adapter.config.vocab_size, context)
                rows.append(_measure(full, exiting, costs, scenario, prompts, rounds, tokens, min_seconds))
        results.append({"depth": scenario.depth, "share": scenario.share, "rows": rows})
    return {
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "num_layers": num_layers,
        "kv_policy": "fitted",
        "prompt_tokens": list(prompt_tokens),
        "tokens_per_resident": tokens,
        "rounds": rounds,
        "min_seconds": min_seconds,
        "scenarios": results,
    }


def forced_routers(loaded: LoadedModel, depth: int, shapes: Sequence[KVShape]) -> Routers:
    """One boundary with heads of random weights: right for speed, not for quality."""
    width = loaded.model.config.get_text_config().hidden_size
    boundary = Boundary(depth, ExitHead(width), Gate(width), KVHead(width, shapes[depth:]), thresholds={"0.02": 0.5})
    fingerprint = fingerprint_of(loaded, kv_policy="fitted", num_layers=len(shapes), hidden_size=width)
    return Routers([boundary], as_facts(fingerprint, label="forced", shapes=shapes, training={}))


def _measure(
    full: TideEngine,
    exiting: TideEngine,
    costs: EngineCosts,
    scenario: Scenario,
    prompts: Sequence[list[int]],
    rounds: int,
    tokens: int,
    min_seconds: float,
) -> dict[str, Any]:
    share, residents = scenario.share, len(prompts)

    def policy(planner: Callable[[], LaunchPlanner], *, unanimous: bool = False) -> Callable[[], None]:
        def prepare() -> None:
            assert exiting.runner.exits is not None
            exiting.runner.exits.policy = ForcedExits([share], unanimous=unanimous)
            exiting.runner.planner = planner()

        return prepare

    chosen_planner = LaunchPlanner(costs, [share])
    contenders = [
        Contender("full depth", full),
        Contender("all rows must agree", exiting, policy(lambda: LaunchPlanner(None, [share]), unanimous=True)),
        Contender("survivors at once", exiting, policy(lambda: LaunchPlanner(None, [share]))),
        Contender("wait for half", exiting, policy(lambda: WaitForFull(share))),
        (chooser := Contender("chosen", exiting, policy(lambda: chosen_planner))),
        Contender(AGAIN, full),
    ]
    if full.runner.adapter.device.type == "cuda":  # products of new shapes load their code first
        take_turns(contenders, prompts, WARM_STEPS, 1, 0.0)
        for contender in contenders:
            contender.rates.clear()
    for _ in range(FIRST_TRIALS):  # a job has them behind it after its first seconds
        chooser.prepare()
        decode_rate(exiting, prompts, tokens)
    take_turns(contenders, prompts, tokens, rounds, min_seconds)
    base = contenders[0], contenders[-1]
    limit = limits(costs, residents, [share])
    chosen = best_plan(costs, residents, [share])
    speedup = chooser.speedup(base)
    return {
        "residents": residents,
        "prompt_tokens": len(prompts[0]),
        "tokens_per_second": {c.name: round(c.rate, 1) for c in contenders},
        "spread": {c.name: [round(min(c.rates), 1), round(max(c.rates), 1)] for c in contenders},
        "speedup": {c.name: round(c.speedup(base), 3) for c in contenders},
        "stage_ms": [round(stage(residents) * 1e3, 3) for stage in costs.stages],
        "gate_ms": [round(gate(residents) * 1e3, 3) for gate in costs.gates],
        "exit_ms": [round(exits(round(residents * share)) * 1e3, 3) for exits in costs.exits],
        "head_ms": round(costs.head(residents) * 1e3, 3),
        "ceiling": round(limit.ceiling, 3),
        "free_bound": round(limit.free_bound, 3),
        "bound": round(limit.bound, 3),
        "bound_holds": limit.plan.holds[0],
        "realised": round(speedup / limit.bound, 3),
        "realised_of_free": round(speedup / limit.free_bound, 3),
        "chosen_is_on": chosen.is_on[0],
        "chosen_holds": chosen.holds[0],
        "expected_speedup": round(chosen.rate / limit.full_rate, 3),
        "trials": [] if chosen_planner.comparison is None else chosen_planner.comparison.to_json(),
    }


def take_turns(
    contenders: Sequence[Contender], prompts: Sequence[list[int]], tokens: int, rounds: int, min_seconds: float
) -> None:
    """Decode in turn, there and back, ``rounds`` times, and on until the first has decoded for ``min_seconds``.

    Other tenants of a machine slow down single runs of a third of a second by a tenth and more.
    """
    for number in itertools.count(1):
        for contender in contenders if number % 2 else reversed(contenders):
            contender.prepare()
            contender.rates.append(decode_rate(contender.engine, prompts, tokens))
        seconds = sum(len(prompts) * tokens_each(len(prompts), tokens) / rate for rate in contenders[0].rates)
        if number >= rounds and seconds >= min_seconds:
            return


def decode_rate(engine: TideEngine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Tokens per second while exactly these prompts decode, ``tokens`` for each on average, more where they are few."""
    stats = engine.stats
    with all_decoding(engine, prompts, answer_room(len(prompts), tokens)):
        tokens = tokens_each(len(prompts), tokens)
        begin = stats.num_generated_tokens
        start = time.perf_counter()
        while stats.num_generated_tokens - begin < len(prompts) * tokens:
            assert len(engine.scheduler.residents) == len(prompts), "an answer ended within the run"
            engine.step()
        if engine.runner.adapter.device.type == "cuda":
            torch.cuda.synchronize()
        return (stats.num_generated_tokens - begin) / (time.perf_counter() - start)


@contextmanager
def all_decoding(engine: TideEngine, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[None]:
    """While this lasts the prompts are resident, past their first tokens, and go on for up to ``max_tokens`` each."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    names = [f"bench-{n}" for n in range(len(prompts))]
    for name, ids in zip(names, prompts, strict=True):
        engine.add_request(name, ids, params)
    try:
        while engine.scheduler.waiting or not all(s.is_decoding for s in engine.scheduler.residents):
            engine.step()
        for _ in range(WARM_STEPS):
            engine.step()
        yield
    finally:
        for name in names:
            engine.abort(name)


def tokens_each(residents: int, tokens: int) -> int:
    """Tokens per resident in a run: a run of few residents would be over before it can be timed."""
    return max(tokens, MIN_TOKENS // residents)


def answer_room(residents: int, tokens: int) -> int:
    """Tokens that an answer may have, so that none ends within a run."""
    tokens = tokens_each(residents, tokens)
    return 2 * WARM_STEPS + tokens + (tokens + STAGGER if residents > 1 else 0)


def random_prompts(count: int, vocab_size: int, prompt_tokens: int = 64) -> list[list[int]]:
    """``count`` prompts of ``prompt_tokens`` random tokens each."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, vocab_size, (count, prompt_tokens), generator=generator).tolist()


def _fitting(
    engine: TideEngine, prompt_tokens: Sequence[int], residents: Sequence[int], tokens: int
) -> list[tuple[int, int]]:
    """Prompt tokens and residents of each cell whose K/V fit into the pages that both engines have."""
    return [
        (context, count)
        for context in prompt_tokens
        for count in residents
        if count * -(-(context + answer_room(count, tokens)) // engine.config.page_size) <= engine.num_kv_pages
    ]
