"""The throughput benchmark's facts as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(facts: dict[str, Any]) -> None:
    """Print the contenders, the profile and the Ray job's overhead."""
    console = Console()
    console.print(
        f"{facts['hardware']}; {facts['num_threads']} threads; {facts['model']} in {facts['dtype']}; "
        f"{facts['prompts']} prompts of {facts['mean_prompt_tokens']} tokens on average, at most {facts['max_tokens']} "
        f"new; {facts['rounds']} rounds; {facts['date']}"
    )
    table = Table(title="throughput", title_justify="left")
    for column in ("contender", "batch", "tokens/s", "slowest to fastest", "over best HF"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in facts["contenders"]:
        spread = f"{row['slowest']:,.1f} to {row['fastest']:,.1f}"
        batch, rate = str(row["batch_size"] or "-"), f"{row['tokens_per_second']:,.1f}"
        table.add_row(row["name"], batch, rate, spread, f"{row['ratio_to_best_hf']:.2f}")
    console.print(table)
    same = facts["agreement_with_hf"]
    console.print(
        f"identical answers {same['identical_answers']:.1%}, tokens before the first difference "
        f"{same['tokens_before_difference']:.1%} ({facts['dtype']} rounds differently in another batch)"
    )
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
