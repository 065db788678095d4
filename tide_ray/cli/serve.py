"""``serve``, ``batch`` and ``api-key``: OpenAI's API, online and from files."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from tide_ray.cli.errors import errors_as_exit_codes
from tide_ray.cli.options import REPEAT, flag
from tide_ray.data.job_config import GenerateJobConfig, read_yaml_mapping
from tide_ray.serve.settings import ServeSettings
from tide_ray.startup import quick_imports

app = typer.Typer()


def _serve_flag(field: str, hint: str = "") -> Any:
    return flag(ServeSettings, field, hint)


def _job_flag(field: str) -> Any:
    return flag(GenerateJobConfig, field)


@app.command()
def serve(
    more_models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODELS]...", help="further models, like --model")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file with llm_configs and ingress_cls_config; of a Serve config its args")
    ] = None,
    model: Annotated[list[str] | None, _serve_flag("model", REPEAT)] = None,
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

        with quick_imports():
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
    model: Annotated[str | None, _job_flag("model")] = None,
    revision: Annotated[str | None, _job_flag("revision")] = None,
    dtype: Annotated[str | None, _job_flag("dtype")] = None,
    device: Annotated[str | None, _job_flag("device")] = None,
    trust_remote_code: Annotated[bool | None, _job_flag("trust_remote_code")] = None,
    seed: Annotated[int | None, _job_flag("seed")] = None,
    max_num_seqs: Annotated[int | None, _job_flag("max_num_seqs")] = None,
    max_model_len: Annotated[int | None, _job_flag("max_model_len")] = None,
    exits: Annotated[str | None, _job_flag("exits")] = None,
    max_disagreement: Annotated[float | None, _job_flag("max_disagreement")] = None,
    num_threads: Annotated[int | None, _job_flag("num_threads")] = None,
    num_actors: Annotated[int | None, _job_flag("num_actors")] = None,
    max_actors: Annotated[int | None, _job_flag("max_actors")] = None,
    num_gpus_per_actor: Annotated[float | None, _job_flag("num_gpus_per_actor")] = None,
    num_cpus_per_actor: Annotated[float | None, _job_flag("num_cpus_per_actor")] = None,
    batch_size: Annotated[int | None, _job_flag("batch_size")] = None,
    address: Annotated[str | None, _job_flag("address")] = None,
    verbose: Annotated[bool | None, _job_flag("verbose")] = None,
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
