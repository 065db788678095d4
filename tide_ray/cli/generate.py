"""``generate``: flags to the configuration of a generation job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tide_ray.cli.errors import errors_as_exit_codes
from tide_ray.cli.options import COMMAS, LABELS, REPEAT, flag, number, number_or_share, split
from tide_ray.cli.options import labels as parse_labels
from tide_ray.data.job_config import GenerateJobConfig, read_yaml_mapping
from tide_ray.startup import quick_imports

app = typer.Typer()


def _flag(field: str, hint: str = "") -> Any:
    return flag(GenerateJobConfig, field, hint)


@app.command()
def generate(
    more_prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPTS]...", help="further prompt sources, like --prompts")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win")] = None,
    model: Annotated[str | None, _flag("model")] = None,
    revision: Annotated[str | None, _flag("revision")] = None,
    prompts: Annotated[list[str] | None, _flag("prompts", REPEAT)] = None,
    prompt_column: Annotated[str | None, _flag("prompt_column")] = None,
    id_column: Annotated[str | None, _flag("id_column")] = None,
    length_column: Annotated[str | None, _flag("length_column")] = None,
    raw: Annotated[bool | None, _flag("raw")] = None,
    system_prompt: Annotated[str | None, _flag("system_prompt")] = None,
    output: Annotated[str | None, _flag("output")] = None,
    limit: Annotated[int | None, _flag("limit")] = None,
    keep_columns: Annotated[str | None, _flag("keep_columns", COMMAS)] = None,
    gate_scores: Annotated[bool | None, _flag("gate_scores")] = None,
    dry_run: Annotated[bool | None, _flag("dry_run")] = None,
    hourly_cost: Annotated[float | None, _flag("hourly_cost")] = None,
    max_errors: Annotated[str | None, _flag("max_errors")] = None,
    retry_errors: Annotated[bool | None, _flag("retry_errors")] = None,
    force_new_run: Annotated[bool | None, _flag("force_new_run")] = None,
    rows_per_part: Annotated[int | None, _flag("rows_per_part")] = None,
    max_tokens: Annotated[int | None, _flag("max_tokens")] = None,
    temperature: Annotated[float | None, _flag("temperature")] = None,
    top_p: Annotated[float | None, _flag("top_p")] = None,
    top_k: Annotated[int | None, _flag("top_k")] = None,
    min_p: Annotated[float | None, _flag("min_p")] = None,
    repetition_penalty: Annotated[float | None, _flag("repetition_penalty")] = None,
    min_tokens: Annotated[int | None, _flag("min_tokens")] = None,
    stop: Annotated[list[str] | None, _flag("stop", REPEAT)] = None,
    stop_token_ids: Annotated[list[int] | None, _flag("stop_token_ids", REPEAT)] = None,
    ignore_eos: Annotated[bool | None, _flag("ignore_eos")] = None,
    seed: Annotated[int | None, _flag("seed")] = None,
    dtype: Annotated[str | None, _flag("dtype")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    trust_remote_code: Annotated[bool | None, _flag("trust_remote_code")] = None,
    max_num_seqs: Annotated[int | None, _flag("max_num_seqs")] = None,
    max_model_len: Annotated[int | None, _flag("max_model_len")] = None,
    max_num_batched_tokens: Annotated[int | None, _flag("max_num_batched_tokens")] = None,
    prefix_caching: Annotated[bool | None, _flag("prefix_caching")] = None,
    policy: Annotated[str | None, _flag("policy")] = None,
    exits: Annotated[str | None, _flag("exits")] = None,
    mode: Annotated[str | None, _flag("mode")] = None,
    exit_threshold: Annotated[float | None, _flag("exit_threshold")] = None,
    exit_error: Annotated[float | None, _flag("exit_error")] = None,
    max_disagreement: Annotated[float | None, _flag("max_disagreement")] = None,
    certified_loss: Annotated[str | None, _flag("certified_loss")] = None,
    shadow: Annotated[float | None, _flag("shadow")] = None,
    exit_min_depth: Annotated[int | None, _flag("exit_min_depth")] = None,
    exits_when: Annotated[str | None, _flag("exits_when")] = None,
    confidence_measure: Annotated[str | None, _flag("confidence_measure")] = None,
    capacity: Annotated[float | None, _flag("capacity")] = None,
    kv_policy: Annotated[str | None, _flag("kv_policy")] = None,
    prefill_share: Annotated[float | None, _flag("prefill_share")] = None,
    prefill_tail: Annotated[int | None, _flag("prefill_tail")] = None,
    exit_layer: Annotated[int | None, _flag("exit_layer")] = None,
    skip_layers: Annotated[str | None, _flag("skip_layers", COMMAS)] = None,
    static_cost: Annotated[float | None, _flag("static_cost")] = None,
    compile: Annotated[str | None, _flag("compile")] = None,
    cuda_graphs: Annotated[str | None, _flag("cuda_graphs")] = None,
    async_scheduling: Annotated[str | None, _flag("async_scheduling")] = None,
    num_threads: Annotated[int | None, _flag("num_threads")] = None,
    num_actors: Annotated[int | None, _flag("num_actors")] = None,
    max_actors: Annotated[int | None, _flag("max_actors")] = None,
    num_gpus_per_actor: Annotated[float | None, _flag("num_gpus_per_actor")] = None,
    num_cpus_per_actor: Annotated[float | None, _flag("num_cpus_per_actor")] = None,
    accelerator_type: Annotated[str | None, _flag("accelerator_type")] = None,
    labels: Annotated[str | None, _flag("labels", LABELS)] = None,
    wait_for_nodes: Annotated[float | None, _flag("wait_for_nodes")] = None,
    batch_size: Annotated[int | None, _flag("batch_size")] = None,
    drain_seconds: Annotated[float | None, _flag("drain_seconds")] = None,
    step_timeout: Annotated[float | None, _flag("step_timeout")] = None,
    address: Annotated[str | None, _flag("address")] = None,
    rejected_rows_ok: Annotated[bool | None, _flag("rejected_rows_ok")] = None,
    verbose: Annotated[bool | None, _flag("verbose")] = None,
    log_format: Annotated[str | None, _flag("log_format")] = None,
) -> None:
    """Generate for every prompt and write Parquet. Without flags: the demo model on bundled prompts.

    Interrupted jobs go on where they stopped when the same command runs again. Exit codes: 0 all rows, 2 usage,
    3 finished with rejected rows (see errors/ in the output folder), 1 failed, 143 stopped by SIGTERM.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with errors_as_exit_codes():
        raise typer.Exit(_run(given))


def _run(given: dict[str, Any]) -> int:
    path = given.pop("config", None)
    if "prompts" in given or "more_prompts" in given:
        given["prompts"] = [*given.get("prompts", []), *given.pop("more_prompts", [])]
    if "keep_columns" in given and given["keep_columns"] != "all":
        given["keep_columns"] = split(given["keep_columns"])
    if "max_errors" in given:
        given["max_errors"] = number_or_share("max_errors", given["max_errors"])
    if "labels" in given:
        given["labels"] = parse_labels(given["labels"])
    if "skip_layers" in given:
        given["skip_layers"] = [number("skip_layers", text) for text in split(given["skip_layers"])]
    settings = GenerateJobConfig.build({**(read_yaml_mapping(path) if path else {}), **given})

    with quick_imports():
        from tide_ray.data.job import run_generate

    return run_generate(settings)
