"""The facts of benchmarks about steps and kernels of a device as tables."""

from __future__ import annotations

from typing import Any

from bench_report import headed
from rich.table import Table


def print_decode_report(facts: dict[str, Any]) -> None:
    """Print everyone's decoding rate by residents beside the roofline, and the longest kernels of a step."""
    console = headed(facts, f"prompts of {facts['prompt_tokens']} tokens; {facts['rounds']} rounds")
    names = list(facts["rows"][0]["tokens_per_second"])
    table = Table(title="tokens/s of steps that decode", title_justify="left")
    for column in ("residents", *names, *(f"x {name}" for name in names[1:]), "roofline", "reached"):
        table.add_column(column, justify="right")
    for row in facts["rows"]:
        table.add_row(
            str(row["residents"]),
            *(f"{row['tokens_per_second'][name]:,.1f}" for name in names),
            *(f"{row['ratios'][name]:.2f}" for name in names[1:]),
            f"{facts['roofline']['tokens_per_second'][str(row['residents'])]:,.0f}",
            f"{row['roofline_share']:.0%}",
        )
    console.print(table)
    for row in facts["rows"]:
        if (profile := row["profile"]) is not None:
            longest = ", ".join(f"{name[:40]} {us:,.0f}" for name, us in list(profile["kernels_us"].items())[:6])
            console.print(
                f"{row['residents']} residents: a step takes {profile['step_us']:,.0f} us, its kernels "
                f"{profile['all_kernels_us']:,.0f}: {longest}"
            )


def print_kernels_report(facts: dict[str, Any]) -> None:
    """Print every kernel's time, share of copy bandwidth, and torch's times."""
    console = headed(facts, f"{facts['dtype']}, rows of {facts['hidden']}, {facts['context']} tokens of context")
    console.print(f"copies: {facts['copy_bytes_per_second'] / 1e9:,.0f} GB/s; launch {facts['launch_us']:.1f} us")
    table = Table(title="one call in a graph of many", title_justify="left")
    for name in ("kernel", "rows", "us", "of copies", "torch eager us", "torch.compile us"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in facts["kernels"]:
        times = [row[name] for name in ("us", "eager_us", "compiled_us")]
        own, *texts = ["-" if us is None else f"{us:.1f}" for us in times]
        share = "-" if row["share_of_copies"] is None else f"{row['share_of_copies']:.0%}"
        table.add_row(row["kernel"], str(row["rows"]), own, share, *texts)
        if row["tide_bytes"] is not None and row["us"] is not None:
            least = row["tide_bytes"] / facts["copy_bytes_per_second"] * 1e6
            table.add_row(f"{row['kernel']}, TIDE's bytes copied", str(row["rows"]), f"{least:.1f}", "100%", "-", "-")
    console.print(table)


def print_kernel_resources_report(facts: dict[str, Any]) -> None:
    """Print registers and spills of every kernel, by architecture."""
    console = headed(facts, f"{len(facts['kernels'])} specialisations, machine code by {facts['assembler']}")
    table = Table(title="registers / bytes of shared memory (bytes spilled)", title_justify="left")
    table.add_column("kernel")
    for architecture in facts["architectures"]:
        table.add_column(architecture, justify="right")
    for name, used in facts["kernels"].items():
        cells = []
        for architecture in facts["architectures"]:
            if (registers := used["registers"].get(architecture)) is None:
                cells.append("")  # it has none for this one
                continue
            spilled = used["spill_bytes"][architecture]
            cells.append(f"{registers} / {used['shared_bytes'][architecture]}" + (f" ({spilled})" if spilled else ""))
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        f"float64 instructions: {facts['float64_instructions']}; kernels that spill: {len(facts['spilling'])}; "
        f"most registers: {facts['most_registers']}"
    )
