"""The benchmarks' facts as tables."""

from __future__ import annotations

import statistics
from typing import Any

from bench_contenders import OURS
from rich.console import Console
from rich.table import Table


def print_report(facts: dict[str, Any]) -> None:
    """Print the contenders, the profile and the Ray job's overhead."""
    console = headed(
        facts,
        f"{facts['prompts']} prompts of {facts['mean_prompt_tokens']} tokens on average, at most {facts['max_tokens']} "
        f"new; {facts['rounds']} rounds",
    )
    console.print(_contenders(facts, "throughput"))
    _print_agreement(console, facts)
    profile = facts["profile"]
    shares = Table(title=f"where the engine's {profile['wall_seconds']:.1f} s go", title_justify="left")
    shares.add_column("part")
    shares.add_column("share", justify="right")
    for name, share in profile["shares"].items():
        shares.add_row(name, f"{share:.1%}")
    console.print(shares)
    if "ray" in facts:
        ray = facts["ray"]
        console.print(
            f"Ray job {ray['job_tokens_per_second']:,.1f} tokens/s, bare engine {ray['bare_tokens_per_second']:,.1f}: "
            f"overhead {ray['overhead']:.1%}; the whole job took {ray['job_wall_seconds']:.1f} s"
        )


def print_peers_report(facts: dict[str, Any]) -> None:
    """Print what the machine allows, everyone's rate, and how our full depth compares with everyone's best."""
    console = headed(
        facts,
        f"{facts['prompts']} prompts of {facts['mean_prompt_tokens']} tokens on average, at most {facts['max_tokens']} "
        f"new; {facts['rounds']} rounds",
    )
    limits = facts["roofline"]
    rates = ", ".join(f"{rate:,.0f} with {size}" for size, rate in limits["tokens_per_second"].items())
    console.print(
        f"roofline: {limits['weight_bytes'] / 1e6:,.0f} MB of weights, copies at "
        f"{limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, products at {limits['gemm_flops_per_second'] / 1e9:,.0f} "
        f"GFLOP/s: at most {rates} resident sequences; reached {facts['roofline_share']:.0%}, prompts included"
    )
    console.print(_contenders(facts, "everyone, in turn"))
    ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in facts["ratios"].items() if name != OURS)
    console.print(f"full depth, each at its best batch size: {ratios}")
    _print_agreement(console, facts)


def print_depth_report(facts: dict[str, Any]) -> None:
    """Print, for every scenario and number of residents, the launch policies beside their limits."""
    console = headed(facts, f"{facts['num_layers']} layers; {facts['kv_policy']} K/V; {facts['rounds']} rounds")
    has_contexts = len(facts["prompt_tokens"]) > 1
    for scenario in facts["scenarios"]:
        names = [name for name in scenario["rows"][0]["speedup"] if name != "full depth"]
        title = f"{scenario['share']:.0%} of tokens exit at depth {scenario['depth']}: speed-up over full depth"
        table = Table(title=title, title_justify="left")
        first = ("prompt", "residents") if has_contexts else ("residents",)
        for column in (*first, "full depth tok/s", *names, "ceiling", "free bound", "bound", "realised"):
            table.add_column(column, justify="right")
        for row in scenario["rows"]:
            table.add_row(
                *([str(row["prompt_tokens"])] if has_contexts else []),
                str(row["residents"]),
                f"{row['tokens_per_second']['full depth']:,.0f}",
                *(f"{row['speedup'][name]:.2f}" for name in names),
                *(f"{row[name]:.2f}" for name in ("ceiling", "free_bound", "bound", "realised")),
            )
        console.print(table)


def print_exits_report(facts: dict[str, Any]) -> None:
    """Print speed and agreement of every variant, and decode rates by residents."""
    console = headed(
        facts,
        f"boundaries {facts['boundaries']}, {facts['kv_policy']} K/V; {facts['prompts']} prompts of "
        f"{facts['mean_prompt_tokens']} tokens, at most {facts['max_tokens']} new; {facts['rounds']} rounds",
    )
    table = Table(title="exits against full depth", title_justify="left")
    for column in ("variant", "tok/s", "speed-up", "ceiling", "agreement (95 %)", "same answers", "depth", "prompt"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in facts["variants"]:
        agreement = "-"
        if "teacher_forced" in row:
            share, low, high = row["teacher_forced"]
            agreement = f"{share:.3f} ({low:.3f}-{high:.3f})"
        table.add_row(
            row["name"],
            *(f"{row[name]:,.2f}" if name in row else "-" for name in ("tokens_per_second", "speedup")),
            f"{row['ceiling_in_layers']:.2f}" if "ceiling_in_layers" in row else "-",
            agreement,
            f"{row['identical_answers']:.1%}" if "identical_answers" in row else "-",
            f"{row['mean_depth']:.1f}" if "mean_depth" in row else "-",
            f"{row['prompt_rows_stopped']:.0%}" if "prompt_rows_stopped" in row else "-",
        )
    console.print(table)
    if facts["residents"]:
        names = list(facts["residents"][0]["speedup"])[1:]
        speeds = Table(title="decode with this many residents: speed-up over full depth", title_justify="left")
        for column in ("residents", "full depth tok/s", *names):
            speeds.add_column(column, justify="right")
        for row in facts["residents"]:
            marks = [
                f"{row['speedup'][n]:.2f}{'' if any(row['boundaries_on'].get(n, [True])) else ' (off)'}" for n in names
            ]
            speeds.add_row(str(row["residents"]), f"{row['tokens_per_second']['full depth']:,.0f}", *marks)
        console.print(speeds)


def print_verified_report(facts: dict[str, Any]) -> None:
    """Print, by residents, the speed of mode verified and what became of its drafts."""
    console = headed(facts, f"{facts['rounds']} rounds, answers of at most {facts['max_tokens']} tokens")
    table = Table(title="mode verified: speed-up over full depth", title_justify="left")
    names = list(facts["residents"][0]["accepted"])
    for column in ("residents", "full depth tok/s", *names, "drafts per token", "accepted", "same answers"):
        table.add_column(column, justify="right")
    for row in facts["residents"]:
        marks = [f"{row['speedup'][n]:.2f}{'' if any(row['boundaries_on'][n]) else ' (off)'}" for n in names]
        accepted = row["accepted"][names[-1]]
        table.add_row(
            str(row["residents"]),
            f"{row['tokens_per_second']['full depth']:,.0f}",
            *marks,
            f"{row['drafts_per_token'][names[-1]]:.2f}",
            "-" if accepted is None else f"{accepted:.1%}",
            f"{min(row['identical_answers'].values()):.1%}",
        )
    console.print(table)


def print_quality_report(facts: dict[str, Any]) -> None:
    """Print agreement with full depth by K/V policy, and by who chooses the prompt tokens that stop."""
    console = headed(
        facts,
        f"{facts['prompts']} prompts of {facts['mean_prompt_tokens']} tokens, {facts['judged_tokens']} tokens judged",
    )
    console.print(
        f"noise floor: full depth agrees with itself {facts['floor_launches']:.4f} in smaller launches, "
        f"{facts['floor_generation']:.4f} between generating and reading"
    )
    levels = list(facts["boundaries"][0]["exits"])
    table = Table(title="agreement with full depth by K/V of skipped layers", title_justify="left")
    for column in ("depth", "K/V", "prompt stops", "half stops", *(f"exits at {float(v):.0%} error" for v in levels)):
        table.add_column(column, justify="right")
    for row in facts["boundaries"]:
        for policy in row["half"]:
            prompt = row["prompt"].get(policy)
            exits = [f"{row['exits'][v][policy]:.3f} ({row['exits'][v]['share']:.0%})" for v in levels]
            cells = ("-" if prompt is None else f"{prompt:.3f}", f"{row['half'][policy]:.3f}", *exits)
            table.add_row(str(row["depth"]), policy, *cells)
    console.print(table)
    orders = ("random", "gate", "oracle", "earliest")
    prefill = Table(title="agreement when a share of the prompt tokens stops, by who chooses", title_justify="left")
    for column in ("depth", "share", *orders, "recovered"):
        prefill.add_column(column, justify="right")
    for row in facts["boundaries"]:
        for one in row["prefill"]:
            cells = (
                *(f"{one[order]:.4f}" for order in orders),
                f"{one['recovered']:.0%}" if one["recovered"] is not None else "-",
            )
            prefill.add_row(str(row["depth"]), f"{one['share']:.0%}", *cells)
    console.print(prefill)


def print_prefix_report(facts: dict[str, Any]) -> None:
    """Print, for both kinds of prompts, the time with and without prefix caching."""
    console = headed(facts, f"{facts['prompts']} prompts, at most {facts['max_tokens']} new; {facts['rounds']} rounds")
    table = Table(title="prefix caching", title_justify="left")
    for column in ("prompts", "tokens each", "from cache", "seconds with", "without", "speed-up", "same answers"):
        table.add_column(column, justify="left" if column == "prompts" else "right")
    for row in facts["kinds"]:
        table.add_row(
            row["kind"],
            f"{row['mean_prompt_tokens']:,.0f}",
            f"{row['hit_rate']:.1%}",
            *(f"{statistics.median(row['seconds'][name]):.2f}" for name in ("with", "without")),
            f"{row['speedup']:.2f}",
            f"{row['agreement']['identical_answers']:.1%}",
        )
    console.print(table)


def print_calibration_report(facts: dict[str, Any]) -> None:
    """Print both sides' time, tokens and memory."""
    console = headed(facts, f"{facts['samples']} samples of {facts['text']}")
    table = Table(title="calibration on text", title_justify="left")
    for column in ("", "seconds", "tokens", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, side in (("TIDE's recipe", facts["recipe"]), ("tide_ray", facts["ours"])):
        table.add_row(name, f"{side['seconds']:,.1f}", f"{side['tokens']:,}", f"{side['peak_gib']:.2f}")
    console.print(table)
    scaled = facts["recipe"]["epochs_run"]
    console.print(f"{facts['ratio']:.1f} times faster (of the recipe's 100 epochs {scaled} were run)")


def _contenders(facts: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("contender", "batch", "tokens/s", "slowest to fastest", "over best HF"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in facts["contenders"]:
        spread = f"{row['slowest']:,.1f} to {row['fastest']:,.1f}"
        batch, rate = str(row["batch_size"] or "-"), f"{row['tokens_per_second']:,.1f}"
        table.add_row(row["name"], batch, rate, spread, f"{row['ratio_to_best_hf']:.2f}")
    return table


def _print_agreement(console: Console, facts: dict[str, Any]) -> None:
    same = facts["agreement_with_hf"]
    console.print(
        f"identical answers {same['identical_answers']:.1%}, tokens before the first difference "
        f"{same['tokens_before_difference']:.1%} ({facts['dtype']} rounds differently in another batch)"
    )


def headed(facts: dict[str, Any], what: str) -> Console:
    """A console that has said where, with which model (if any) and when it was measured."""
    console = Console()
    model = f"; {facts['model']} in {facts['dtype']}" if "model" in facts else ""
    console.print(f"{facts['hardware']}; {facts['num_threads']} threads{model}; {what}; {facts['date']}")
    return console


def print_serving_report(facts: dict[str, Any]) -> None:
    """Print what clients saw, and the server's rate beside the bare engine's."""
    console = headed(facts, f"{facts['concurrency']} streams of {facts['max_tokens']} tokens")
    table = Table(title="seen by clients, milliseconds", title_justify="left")
    for name in (
        "load",
        "seconds",
        "answers",
        "failed",
        "refused",
        "tokens/s",
        "first token p50, p95",
        "token p50, p95",
    ):
        table.add_column(name, justify="left" if name == "load" else "right")
    for name, key in (("steady", "steady"), ("overload", "overload"), ("after it", "after_overload")):
        if (run := facts[key]) is not None:
            times = [
                "-" if run[part] is None else f"{run[part]['p50']:,.0f}, {run[part]['p95']:,.0f}"
                for part in ("first_token_ms", "token_ms")
            ]
            counts = [f"{run[part]:,}" for part in ("answers", "failures", "refused")]
            table.add_row(name, f"{run['seconds']:.0f}", *counts, f"{run['tokens_per_second']:,.0f}", *times)
    console.print(table)
    memory = facts["megabytes"]
    print(f"memory {memory['first_third']:,.0f} MB in the first third, {memory['last_third']:,.0f} MB in the last")
    if facts["share_of_bare"] is not None:
        bare, served = (
            ", ".join(f"{rate:,.0f}" for rate in facts[f"{who}_tokens_per_second"]) for who in ("bare", "served")
        )
        print(f"in turn: bare engine {bare} tokens/s, served {served}: {facts['share_of_bare']:.1%}")
