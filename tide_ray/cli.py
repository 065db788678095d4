"""The ``tide-ray`` command: flags to a job configuration, and errors to exit codes.

torch and ray are imported only when a job runs, so that help is instant.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from tide_ray.calibrate.config import CalibrationConfig, CertificationConfig, EvaluationConfig
from tide_ray.calibrate.sweep_config import Resources, SweepConfig, is_sweep
from tide_ray.cli_errors import EXIT_USAGE, errors_as_exit_codes, fail
from tide_ray.cli_jobs import app as jobs_app
from tide_ray.data.job_config import GenerateJobConfig, read_yaml_mapping
from tide_ray.serve.settings import ServeSettings
from tide_ray.types import UserError

app = typer.Typer(
    name="tide-ray",
    help="Distributed batch inference on Ray: prompts in, Parquet with a depth and a time for every token out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(jobs_app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from tide_ray import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distributed batch inference on Ray: prompts in, Parquet with a depth and a time for every token out."""


def _flag(field: str, hint: str = "", config: type[BaseModel] = GenerateJobConfig) -> Any:
    """An option for a field of a job's configuration, with the field's own description and default in its help."""
    info = config.model_fields[field]
    default = info.get_default(call_default_factory=True)
    shown = "" if default in (None, [], {}) or isinstance(default, bool) else f" [{default}]"
    return typer.Option(help=f"{info.description}{hint}{shown}")


_REPEAT = "; may be given several times"
_COMMAS = ", separated by commas"


@app.command()
def generate(
    more_prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPTS]...", help="further prompt sources, like --prompts")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win")] = None,
    model: Annotated[str | None, _flag("model")] = None,
    revision: Annotated[str | None, _flag("revision")] = None,
    prompts: Annotated[list[str] | None, _flag("prompts", _REPEAT)] = None,
    prompt_column: Annotated[str | None, _flag("prompt_column")] = None,
    id_column: Annotated[str | None, _flag("id_column")] = None,
    raw: Annotated[bool | None, _flag("raw")] = None,
    system_prompt: Annotated[str | None, _flag("system_prompt")] = None,
    output: Annotated[str | None, _flag("output")] = None,
    limit: Annotated[int | None, _flag("limit")] = None,
    keep_columns: Annotated[str | None, _flag("keep_columns", _COMMAS)] = None,
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
    stop: Annotated[list[str] | None, _flag("stop", _REPEAT)] = None,
    stop_token_ids: Annotated[list[int] | None, _flag("stop_token_ids", _REPEAT)] = None,
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
    skip_layers: Annotated[str | None, _flag("skip_layers", _COMMAS)] = None,
    static_cost: Annotated[float | None, _flag("static_cost")] = None,
    compile: Annotated[str | None, _flag("compile")] = None,
    cuda_graphs: Annotated[str | None, _flag("cuda_graphs")] = None,
    async_scheduling: Annotated[str | None, _flag("async_scheduling")] = None,
    num_threads: Annotated[int | None, _flag("num_threads")] = None,
    num_actors: Annotated[int | None, _flag("num_actors")] = None,
    num_gpus_per_actor: Annotated[float | None, _flag("num_gpus_per_actor")] = None,
    num_cpus_per_actor: Annotated[float | None, _flag("num_cpus_per_actor")] = None,
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
        given["keep_columns"] = _split(given["keep_columns"])
    if "max_errors" in given:
        given["max_errors"] = _number_or_share("max_errors", given["max_errors"])
    if "skip_layers" in given:
        given["skip_layers"] = [_number("skip_layers", text) for text in _split(given["skip_layers"])]
    settings = GenerateJobConfig.build({**(read_yaml_mapping(path) if path else {}), **given})

    from tide_ray.data.job import run_generate

    return run_generate(settings)


def _calibration_flag(field: str, hint: str = "") -> Any:
    return _flag(field, hint, CalibrationConfig)


@app.command()
def calibrate(
    config: Annotated[
        str | None, typer.Option(help="YAML file with any of these settings, or a list of models; flags win")
    ] = None,
    model: Annotated[list[str] | None, _calibration_flag("model", "; several make a sweep")] = None,
    revision: Annotated[str | None, _calibration_flag("revision")] = None,
    prompts: Annotated[list[str] | None, _calibration_flag("prompts", _REPEAT)] = None,
    text: Annotated[str | None, _calibration_flag("text")] = None,
    prompt_column: Annotated[str | None, _calibration_flag("prompt_column")] = None,
    num_prompts: Annotated[int | None, _calibration_flag("num_prompts")] = None,
    raw: Annotated[bool | None, _calibration_flag("raw")] = None,
    output: Annotated[str | None, _calibration_flag("output", ", or of a sweep's, by default ./tide-sweep")] = None,
    boundaries: Annotated[str | None, _calibration_flag("boundaries", _COMMAS)] = None,
    max_tokens: Annotated[int | None, _calibration_flag("max_tokens")] = None,
    kv_policy: Annotated[str | None, _calibration_flag("kv_policy")] = None,
    rank: Annotated[int | None, _calibration_flag("rank")] = None,
    refine: Annotated[bool | None, _calibration_flag("refine")] = None,
    shortlist: Annotated[int | None, _calibration_flag("shortlist")] = None,
    bottleneck: Annotated[int | None, _calibration_flag("bottleneck")] = None,
    seed: Annotated[int | None, _calibration_flag("seed")] = None,
    dtype: Annotated[str | None, _calibration_flag("dtype")] = None,
    device: Annotated[str | None, _calibration_flag("device")] = None,
    trust_remote_code: Annotated[bool | None, _calibration_flag("trust_remote_code")] = None,
    num_threads: Annotated[int | None, _calibration_flag("num_threads")] = None,
    workers: Annotated[int | None, _flag("workers", config=Resources)] = None,
    num_gpus: Annotated[float | None, _flag("num_gpus", config=Resources)] = None,
    num_cpus: Annotated[float | None, _flag("num_cpus", config=Resources)] = None,
    memory: Annotated[float | None, _flag("memory", config=Resources)] = None,
    labels: Annotated[str | None, _flag("labels", ", NAME=VALUE" + _COMMAS, Resources)] = None,
    max_parallel: Annotated[int | None, _flag("max_parallel", config=SweepConfig)] = None,
    max_cpus: Annotated[float | None, _flag("max_cpus", config=SweepConfig)] = None,
    address: Annotated[str | None, _flag("address", config=SweepConfig)] = None,
    verbose: Annotated[bool | None, _flag("verbose", config=SweepConfig)] = None,
) -> None:
    """Calibrate routers for a model on its own answers, and write a router checkpoint for ``generate --exits``.

    Several models, or any flag from --workers on, make a sweep: Ray tasks, and a folder per model in the output. It
    goes on where it stopped when the same command runs again. Its exit codes: 0 all models, 1 some failed, 2 usage.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with errors_as_exit_codes():
        path = given.pop("config", None)
        if "boundaries" in given:
            given["boundaries"] = [_number("boundaries", text) for text in _split(given["boundaries"])]
        if "labels" in given:
            given["labels"] = dict(_label(text) for text in _split(given["labels"]))
        values = read_yaml_mapping(path) if path else {}
        models = given.pop("model", [])
        if models:
            values = {name: value for name, value in values.items() if name not in ("model", "models")}
            given |= {"model": models[0]} if len(models) == 1 else {"models": models}
        values |= given
        if is_sweep(values):
            sweep = SweepConfig.build(values)

            from tide_ray.calibrate.sweep import run_sweep

            raise typer.Exit(run_sweep(sweep))
        settings = CalibrationConfig.build(values)

        from tide_ray.calibrate.job import run_calibrate

        run_calibrate(settings)


def _certification_flag(field: str, hint: str = "") -> Any:
    return _flag(field, hint, CertificationConfig)


@app.command()
def certify(
    routers: Annotated[str, typer.Argument(help="folder of the router checkpoint, which gets the certificates")],
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win")] = None,
    prompts: Annotated[list[str] | None, _certification_flag("prompts", _REPEAT)] = None,
    prompt_column: Annotated[str | None, _certification_flag("prompt_column")] = None,
    skip: Annotated[int | None, _certification_flag("skip")] = None,
    num_prompts: Annotated[int | None, _certification_flag("num_prompts")] = None,
    num_ordering: Annotated[int | None, _certification_flag("num_ordering")] = None,
    epsilons: Annotated[str | None, _certification_flag("epsilons", _COMMAS)] = None,
    delta: Annotated[float | None, _certification_flag("delta")] = None,
    loss: Annotated[str | None, _certification_flag("loss")] = None,
    p_value: Annotated[str | None, _certification_flag("p_value")] = None,
    prefill: Annotated[bool | None, _certification_flag("prefill")] = None,
    prefill_tail: Annotated[int | None, _certification_flag("prefill_tail")] = None,
    max_tokens: Annotated[int | None, _certification_flag("max_tokens")] = None,
    raw: Annotated[bool | None, _certification_flag("raw")] = None,
    model: Annotated[str | None, _certification_flag("model")] = None,
    revision: Annotated[str | None, _certification_flag("revision")] = None,
    dtype: Annotated[str | None, _certification_flag("dtype")] = None,
    device: Annotated[str | None, _certification_flag("device")] = None,
    trust_remote_code: Annotated[bool | None, _certification_flag("trust_remote_code")] = None,
    num_threads: Annotated[int | None, _certification_flag("num_threads")] = None,
    seed: Annotated[int | None, _certification_flag("seed")] = None,
) -> None:
    """Certify a checkpoint's exits on prompts it has not seen, for ``generate --exits ROUTERS --max-disagreement``."""
    given = {name: value for name, value in locals().items() if value is not None}
    with errors_as_exit_codes():
        path = given.pop("config", None)
        if "epsilons" in given:
            given["epsilons"] = [_share("epsilons", text) for text in _split(given["epsilons"])]
        settings = CertificationConfig.build({**(read_yaml_mapping(path) if path else {}), **given})

        from tide_ray.calibrate.job import run_certify

        run_certify(settings)


def _evaluation_flag(field: str, hint: str = "") -> Any:
    return _flag(field, hint, EvaluationConfig)


@app.command()
def evaluate(
    routers: Annotated[str, typer.Argument(help="folder of the router checkpoint")],
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win")] = None,
    prompts: Annotated[list[str] | None, _evaluation_flag("prompts", _REPEAT)] = None,
    prompt_column: Annotated[str | None, _evaluation_flag("prompt_column")] = None,
    answer_column: Annotated[str | None, _evaluation_flag("answer_column")] = None,
    skip: Annotated[int | None, _evaluation_flag("skip")] = None,
    num_prompts: Annotated[int | None, _evaluation_flag("num_prompts")] = None,
    max_disagreements: Annotated[str | None, _evaluation_flag("max_disagreements", _COMMAS)] = None,
    exit_errors: Annotated[str | None, _evaluation_flag("exit_errors", _COMMAS)] = None,
    baselines: Annotated[bool | None, _evaluation_flag("baselines")] = None,
    text: Annotated[str | None, _evaluation_flag("text")] = None,
    num_paragraphs: Annotated[int | None, _evaluation_flag("num_paragraphs")] = None,
    rounds: Annotated[int | None, _evaluation_flag("rounds")] = None,
    max_tokens: Annotated[int | None, _evaluation_flag("max_tokens")] = None,
    max_num_seqs: Annotated[int | None, _evaluation_flag("max_num_seqs")] = None,
    raw: Annotated[bool | None, _evaluation_flag("raw")] = None,
    output: Annotated[str | None, _evaluation_flag("output")] = None,
    model: Annotated[str | None, _evaluation_flag("model")] = None,
    revision: Annotated[str | None, _evaluation_flag("revision")] = None,
    dtype: Annotated[str | None, _evaluation_flag("dtype")] = None,
    device: Annotated[str | None, _evaluation_flag("device")] = None,
    trust_remote_code: Annotated[bool | None, _evaluation_flag("trust_remote_code")] = None,
    num_threads: Annotated[int | None, _evaluation_flag("num_threads")] = None,
) -> None:
    """Compare a checkpoint's certified settings with full depth on prompts that it has not seen."""
    given = {name: value for name, value in locals().items() if value is not None}
    with errors_as_exit_codes():
        path = given.pop("config", None)
        for name in ("max_disagreements", "exit_errors"):
            if name in given:
                given[name] = [_share(name, text) for text in _split(given[name])]
        settings = EvaluationConfig.build({**(read_yaml_mapping(path) if path else {}), **given})

        from tide_ray.calibrate.job import run_evaluate

        run_evaluate(settings)


def _serve_flag(field: str, hint: str = "") -> Any:
    return _flag(field, hint, ServeSettings)


@app.command()
def serve(
    more_models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODELS]...", help="further models, like --model")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file with llm_configs and ingress_cls_config; of a Serve config its args")
    ] = None,
    model: Annotated[list[str] | None, _serve_flag("model", _REPEAT)] = None,
    host: Annotated[str | None, _serve_flag("host")] = None,
    port: Annotated[int | None, _serve_flag("port")] = None,
    api_keys_file: Annotated[str | None, _serve_flag("api_keys_file")] = None,
    ssl_keyfile: Annotated[str | None, _serve_flag("ssl_keyfile")] = None,
    ssl_certfile: Annotated[str | None, _serve_flag("ssl_certfile")] = None,
    ssl_ca_certs: Annotated[str | None, _serve_flag("ssl_ca_certs")] = None,
    num_replicas: Annotated[int | None, _serve_flag("num_replicas")] = None,
    exits: Annotated[str | None, _serve_flag("exits")] = None,
    exit_threshold: Annotated[float | None, _serve_flag("exit_threshold")] = None,
    max_disagreement: Annotated[float | None, _serve_flag("max_disagreement")] = None,
    dtype: Annotated[str | None, _serve_flag("dtype")] = None,
    device: Annotated[str | None, _serve_flag("device")] = None,
    revision: Annotated[str | None, _serve_flag("revision")] = None,
    trust_remote_code: Annotated[bool | None, _serve_flag("trust_remote_code")] = None,
    max_num_seqs: Annotated[int | None, _serve_flag("max_num_seqs")] = None,
    max_model_len: Annotated[int | None, _serve_flag("max_model_len")] = None,
    num_threads: Annotated[int | None, _serve_flag("num_threads")] = None,
    max_queued_requests: Annotated[int | None, _serve_flag("max_queued_requests")] = None,
    max_body_bytes: Annotated[int | None, _serve_flag("max_body_bytes")] = None,
    max_prompt_tokens: Annotated[int | None, _serve_flag("max_prompt_tokens")] = None,
    max_completion_tokens: Annotated[int | None, _serve_flag("max_completion_tokens")] = None,
    requests_per_minute: Annotated[float | None, _serve_flag("requests_per_minute")] = None,
    request_timeout_s: Annotated[float | None, _serve_flag("request_timeout_s")] = None,
    drain_timeout_s: Annotated[float | None, _serve_flag("drain_timeout_s")] = None,
    address: Annotated[str | None, _serve_flag("address")] = None,
    verbose: Annotated[bool | None, _serve_flag("verbose")] = None,
) -> None:
    """Serve models over an OpenAI-compatible API on Ray Serve. Without flags: the demo model at 127.0.0.1:8000.

    TIDE_RAY_API_KEYS may hold API keys, TIDE_RAY_SSL_KEYFILE_PASSWORD the password of the TLS key.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with errors_as_exit_codes():
        path = given.pop("config", None)
        if "model" in given or "more_models" in given:
            given["model"] = [*given.get("model", []), *given.pop("more_models", [])]
        password = os.environ.get("TIDE_RAY_SSL_KEYFILE_PASSWORD")
        settings = ServeSettings.build({**given, **({"ssl_keyfile_password": password} if password else {})})
        args = settings.serving_args(path)

        from tide_ray.serve.run import run_serve

        raise typer.Exit(run_serve(settings, args))


@app.command()
def batch(
    source: Annotated[str, typer.Argument(metavar="IN", help="OpenAI batch file: custom_id, method, url and body")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="where the answers go; the job's folder is OUT.job")],
    errors: Annotated[
        str | None, typer.Option(help="where failed requests go [OUT with .errors before its ending]")
    ] = None,
    model_id: Annotated[str | None, typer.Option(help="the name that bodies use for the model [as --model]")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with settings of generate; flags win")] = None,
    model: Annotated[str | None, _flag("model")] = None,
    revision: Annotated[str | None, _flag("revision")] = None,
    dtype: Annotated[str | None, _flag("dtype")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    trust_remote_code: Annotated[bool | None, _flag("trust_remote_code")] = None,
    seed: Annotated[int | None, _flag("seed")] = None,
    max_num_seqs: Annotated[int | None, _flag("max_num_seqs")] = None,
    max_model_len: Annotated[int | None, _flag("max_model_len")] = None,
    exits: Annotated[str | None, _flag("exits")] = None,
    max_disagreement: Annotated[float | None, _flag("max_disagreement")] = None,
    num_threads: Annotated[int | None, _flag("num_threads")] = None,
    num_actors: Annotated[int | None, _flag("num_actors")] = None,
    num_gpus_per_actor: Annotated[float | None, _flag("num_gpus_per_actor")] = None,
    num_cpus_per_actor: Annotated[float | None, _flag("num_cpus_per_actor")] = None,
    batch_size: Annotated[int | None, _flag("batch_size")] = None,
    address: Annotated[str | None, _flag("address")] = None,
    verbose: Annotated[bool | None, _flag("verbose")] = None,
) -> None:
    """Answer an OpenAI batch file offline, with the same requests and answers as ``serve``.

    An interrupted batch goes on where it stopped when the same command runs again. Exit codes: 0 all requests, 2 usage,
    3 some failed, 1 the job failed.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("source", "target", "errors", "model_id", "config"):
        given.pop(name, None)
    with errors_as_exit_codes():
        from tide_ray.serve.batch import BatchPaths, run_batch

        values = {**(read_yaml_mapping(config) if config else {}), **given}
        raise typer.Exit(run_batch(BatchPaths.of(source, target, errors), values, model_id))


@app.command("api-key")
def api_key(
    name: Annotated[str, typer.Argument(help="whose key it is; shown in logs")],
    file: Annotated[str | None, typer.Option(help="append the entry to this file, for serve --api-keys-file")] = None,
) -> None:
    """Make an API key: prints it once; what is kept is its hash, as NAME:sha256:HEX."""
    from tide_ray.serve.keys import append_to_file, new_key, stored

    with errors_as_exit_codes():
        key = new_key()
        entry = stored(name, key)
        if file is None:
            typer.echo(entry, err=True)
        else:
            append_to_file(file, entry)
        typer.echo(key)


@app.command("import-tide")
def import_tide(
    router: Annotated[str, typer.Argument(help="router.pt that TIDE wrote")],
    model: Annotated[str, _calibration_flag("model")] = "demo",
    revision: Annotated[str | None, _calibration_flag("revision")] = None,
    output: Annotated[str, _calibration_flag("output")] = "./tide-routers",
    dtype: Annotated[str, _calibration_flag("dtype")] = "auto",
    device: Annotated[str, _calibration_flag("device")] = "auto",
    trust_remote_code: Annotated[bool, _calibration_flag("trust_remote_code")] = False,
) -> None:
    """Make a router checkpoint of a router.pt of TIDE, for ``generate --exits OUT --policy posthoc``."""
    try:
        settings = CalibrationConfig.build(
            {"model": model, "revision": revision, "output": output, "dtype": dtype, "device": device}
            | {"trust_remote_code": trust_remote_code}
        )

        from tide_ray.exits.checkpoint import check_output_folder
        from tide_ray.exits.tide_import import import_tide
        from tide_ray.models.load import load_as

        check_output_folder(Path(settings.output))
        loaded = load_as(settings.model, settings)
        routers = import_tide(router, loaded)
        routers.save(settings.output)
        typer.echo(f"boundaries {', '.join(map(str, routers.depths))} written to {settings.output}")
    except UserError as error:
        fail(error, EXIT_USAGE)


@app.command()
def doctor() -> None:
    """Print what runs on this machine and why: versions, devices, and which kernels are on."""
    from tide_ray.doctor import report

    for name, finding in report():
        typer.echo(f"{name:<12} {finding}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name} must be layer numbers separated by commas, got {text!r}")
    return int(text)


def _label(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"labels must be NAME=VALUE separated by commas, got {text!r}")
    return name.strip(), value.strip()


def _number_or_share(name: str, text: str) -> int | float:
    """A whole number, or a share as a fraction or in percent."""
    try:
        return int(text) if text.strip().isdigit() else _share(name, text.rstrip("%")) / (100 if "%" in text else 1)
    except UserError:
        raise UserError(f"{name} must be a number of rows or a share like 0.05 or 5%, got {text!r}") from None


def _share(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} must be numbers separated by commas, got {text!r}") from None


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
