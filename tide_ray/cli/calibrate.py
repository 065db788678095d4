"""``calibrate``, ``certify``, ``evaluate`` and ``import-tide``: what makes and judges router checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tide_ray.calibrate.config import CalibrationConfig, CertificationConfig, EvaluationConfig
from tide_ray.calibrate.sweep_config import Resources, SweepConfig, is_sweep
from tide_ray.cli.errors import errors_as_exit_codes
from tide_ray.cli.options import COMMAS, LABELS, REPEAT, flag, number, share, split
from tide_ray.cli.options import labels as parse_labels
from tide_ray.data.job_config import read_yaml_mapping
from tide_ray.startup import quick_imports

app = typer.Typer()


def _calibration_flag(field: str, hint: str = "") -> Any:
    return flag(CalibrationConfig, field, hint)


@app.command()
def calibrate(
    config: Annotated[
        str | None, typer.Option(help="YAML file with any of these settings, or a list of models; flags win")
    ] = None,
    model: Annotated[list[str] | None, _calibration_flag("model", "; several make a sweep")] = None,
    revision: Annotated[str | None, _calibration_flag("revision")] = None,
    prompts: Annotated[list[str] | None, _calibration_flag("prompts", REPEAT)] = None,
    text: Annotated[str | None, _calibration_flag("text")] = None,
    prompt_column: Annotated[str | None, _calibration_flag("prompt_column")] = None,
    num_prompts: Annotated[int | None, _calibration_flag("num_prompts")] = None,
    raw: Annotated[bool | None, _calibration_flag("raw")] = None,
    output: Annotated[str | None, _calibration_flag("output", ", or of a sweep's, by default ./tide-sweep")] = None,
    boundaries: Annotated[str | None, _calibration_flag("boundaries", COMMAS)] = None,
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
    workers: Annotated[int | None, flag(Resources, "workers")] = None,
    num_gpus: Annotated[float | None, flag(Resources, "num_gpus")] = None,
    num_cpus: Annotated[float | None, flag(Resources, "num_cpus")] = None,
    memory: Annotated[float | None, flag(Resources, "memory")] = None,
    labels: Annotated[str | None, flag(Resources, "labels", LABELS)] = None,
    max_parallel: Annotated[int | None, flag(SweepConfig, "max_parallel")] = None,
    max_cpus: Annotated[float | None, flag(SweepConfig, "max_cpus")] = None,
    address: Annotated[str | None, flag(SweepConfig, "address")] = None,
    verbose: Annotated[bool | None, flag(SweepConfig, "verbose")] = None,
) -> None:
    """Calibrate routers for a model on its own answers, and write a router checkpoint for ``generate --exits``.

    Several models, or any flag from --workers on, make a sweep: Ray tasks, and a folder per model in the output. It
    goes on where it stopped when the same command runs again. Its exit codes: 0 all models, 1 some failed, 2 usage.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with errors_as_exit_codes():
        path = given.pop("config", None)
        if "boundaries" in given:
            given["boundaries"] = [number("boundaries", text) for text in split(given["boundaries"])]
        if "labels" in given:
            given["labels"] = parse_labels(given["labels"])
        values = read_yaml_mapping(path) if path else {}
        models = given.pop("model", [])
        if models:
            values = {name: value for name, value in values.items() if name not in ("model", "models")}
            given |= {"model": models[0]} if len(models) == 1 else {"models": models}
        values |= given
        if is_sweep(values):
            sweep = SweepConfig.build(values)

            with quick_imports():
                from tide_ray.calibrate.sweep import run_sweep

            raise typer.Exit(run_sweep(sweep))
        settings = CalibrationConfig.build(values)

        with quick_imports():
            from tide_ray.calibrate.job import run_calibrate

        run_calibrate(settings)


def _certification_flag(field: str, hint: str = "") -> Any:
    return flag(CertificationConfig, field, hint)


@app.command()
def certify(
    routers: Annotated[str, typer.Argument(help="folder of the router checkpoint, which gets the certificates")],
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win")] = None,
    prompts: Annotated[list[str] | None, _certification_flag("prompts", REPEAT)] = None,
    prompt_column: Annotated[str | None, _certification_flag("prompt_column")] = None,
    skip: Annotated[int | None, _certification_flag("skip")] = None,
    num_prompts: Annotated[int | None, _certification_flag("num_prompts")] = None,
    num_ordering: Annotated[int | None, _certification_flag("num_ordering")] = None,
    epsilons: Annotated[str | None, _certification_flag("epsilons", COMMAS)] = None,
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
            given["epsilons"] = [share("epsilons", text) for text in split(given["epsilons"])]
        settings = CertificationConfig.build({**(read_yaml_mapping(path) if path else {}), **given})

        with quick_imports():
            from tide_ray.calibrate.job import run_certify

        run_certify(settings)


def _evaluation_flag(field: str, hint: str = "") -> Any:
    return flag(EvaluationConfig, field, hint)


@app.command()
def evaluate(
    routers: Annotated[str, typer.Argument(help="folder of the router checkpoint")],
    config: Annotated[str | None, typer.Option(help="YAML file with any of these settings; flags win")] = None,
    prompts: Annotated[list[str] | None, _evaluation_flag("prompts", REPEAT)] = None,
    prompt_column: Annotated[str | None, _evaluation_flag("prompt_column")] = None,
    answer_column: Annotated[str | None, _evaluation_flag("answer_column")] = None,
    skip: Annotated[int | None, _evaluation_flag("skip")] = None,
    num_prompts: Annotated[int | None, _evaluation_flag("num_prompts")] = None,
    max_disagreements: Annotated[str | None, _evaluation_flag("max_disagreements", COMMAS)] = None,
    exit_errors: Annotated[str | None, _evaluation_flag("exit_errors", COMMAS)] = None,
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
                given[name] = [share(name, text) for text in split(given[name])]
        settings = EvaluationConfig.build({**(read_yaml_mapping(path) if path else {}), **given})

        with quick_imports():
            from tide_ray.calibrate.job import run_evaluate

        run_evaluate(settings)


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
    with errors_as_exit_codes():
        settings = CalibrationConfig.build(
            {"model": model, "revision": revision, "output": output, "dtype": dtype, "device": device}
            | {"trust_remote_code": trust_remote_code}
        )

        with quick_imports():
            from tide_ray.exits.checkpoint_files import check_output_folder
            from tide_ray.exits.tide_import import import_tide
            from tide_ray.models.loading import load_as

        check_output_folder(Path(settings.output))
        loaded = load_as(settings.model, settings)
        routers = import_tide(router, loaded)
        routers.save(settings.output)
        typer.echo(f"boundaries {', '.join(map(str, routers.depths))} written to {settings.output}")
