"""The command line: every mistake is one line on stderr and exit code 2, before Ray starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from exit_helpers import make_certificate, make_routers
from references import loaded
from tide_ray import __version__
from tide_ray.calibrate.config import CertificationConfig, CheckpointPrompts, EvaluationConfig
from tide_ray.cli import app
from tide_ray.data.cluster import connected
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.exits.checkpoint_files import add_certificates
from tide_ray.types import UserError
from tiny_models import build_tiny_model


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"question": "why?", "prompt": "x"}) + "\n")
    return path


def assert_refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "absent.jsonl"], "prompts: file not found: 'absent.jsonl'"),
        (["--prompt-column", "text"], "has no column 'text'; columns: question, prompt"),
        (["--keep-columns", "question,answer"], "has no column 'answer'; columns: question, prompt"),
        (["--id-column", "id"], "has no column 'id'; columns: question, prompt"),
        (["--model", "no/such/model/folder"], "model: no such folder or file, got 'no/such/model/folder'"),
        (["--model", "~nobody-of-that-name/x"], "model: no such folder or file, got '~nobody-of-that-name/x'"),
        (["--output", "~nobody-of-that-name/x"], "output: no such home, got '~nobody-of-that-name/x'"),
        (["--dtype", "int3"], "dtype must be one of auto, float32, bfloat16, float16, got 'int3'"),
        (["--device", "tpu"], "device: "),
        (["--policy", "static"], "policy 'static' needs exactly one of exit_layer, skip_layers, static_cost"),
        (["--exit-layer", "3"], "exit_layer needs policy 'static', got policy 'auto'"),
        (
            ["--policy", "magic"],
            "policy must be one of auto, full, static, router, confidence, capacity, posthoc, got 'magic'",
        ),
        (
            ["--policy", "static", "--skip-layers", "1,x"],
            "skip_layers must be layer numbers separated by commas, got 'x'",
        ),
        (["--policy", "static", "--static-cost", "2"], "static_cost must be in (0, 1], got 2.0"),
        (["--temperature", "-1"], "temperature must be a number from 0 to 100, got -1.0"),
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--min-tokens", "200"], "min_tokens must be from 0 to max_tokens, got 200"),
        (["--limit", "0"], "limit: input should be greater than or equal to 1, got 0"),
        (["--batch-size", "0"], "batch_size: input should be greater than or equal to 1, got 0"),
        (["--num-actors", "0"], "num_actors: input should be greater than or equal to 1, got 0"),
        (["--num-actors", "3", "--max-actors", "2"], "max_actors must be at least num_actors, 3, got 2"),
        (["--labels", "zone"], "labels must be NAME=VALUE separated by commas, got 'zone'"),
        (["--labels", "zone=a b"], "labels: expected NAME: VALUE, !VALUE or in(A, B), got 'zone': 'a b'"),
        (["--accelerator-type", ""], "accelerator_type: "),
        (["--max-num-seqs", "0"], "max_num_seqs must be a positive integer, got 0"),
        (["--raw", "--system-prompt", "Be brief."], "system_prompt needs the chat template, got raw=True"),
        (
            ["--output", "ftp://host/x"],
            "output must be a path or s3://BUCKET/KEY, gs://BUCKET/KEY, az://BUCKET/KEY, got",
        ),
        (["--max-disagreement", "0.01"], "max_disagreement needs exits, a router checkpoint, got 0.01"),
        (["--exits", "absent", "--max-disagreement", "0.01"], "exits must be a router checkpoint"),
        (
            ["--exits", "r", "--max-disagreement", "0.01", "--exit-error", "0.01"],
            "max_disagreement and exit_error exclude each other, got exit_error 0.01",
        ),
        (["--config", "absent.yaml"], "config: cannot read 'absent.yaml': No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, prompts: Path, flags: list[str], message: str) -> None:
    arguments = ["generate", "--output", tmp_path / "out", *([] if "--prompts" in flags else ["--prompts", prompts])]
    assert_refused(invoke(*arguments, *flags), message)


OWN_CODE = {"model_type": "mystery", "auto_map": {"AutoConfig": "configuration.Mystery"}}


@pytest.mark.parametrize(
    ("config", "has_weights", "expected"),
    [
        (None, False, "no config.json in"),
        ({"model_type": "llama"}, False, "no weights"),
        ({"model_type": "t5"}, True, "'t5'"),
        ({"model_type": "mystery"}, True, "has a model type that transformers does not know, got 'mystery'"),
        (OWN_CODE, True, "brings its own modelling code for model type 'mystery'; pass --trust-remote-code"),
    ],
)
def test_a_model_folder_that_cannot_run_is_refused(
    tmp_path: Path, prompts: Path, config: dict[str, Any] | None, has_weights: bool, expected: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if has_weights:
        (folder / "model.safetensors").write_bytes(b"\0" * 64)
    assert_refused(
        invoke("generate", "--model", folder, "--prompts", prompts, "--output", tmp_path / "out"), "model: ", expected
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_tokens: [", "is not YAML"),
        ("- model", "must hold a mapping of field names to values"),
        ("max_token: 3", "config: unknown field 'max_token'; known: model, revision, prompts"),
        ("max_tokens: many", "max_tokens: input should be a valid integer, got 'many'"),
        ("prompts: one.jsonl", "prompts: input should be a valid list, got 'one.jsonl'"),
        ("labels: {zone: 1}", "labels: input should be a valid string, got 1"),
        ("stop: [1]", "stop: input should be a valid string, got 1"),
        ("temperature: -2", "temperature must be a number from 0 to 100, got -2"),
    ],
)
def test_a_mistake_in_yaml_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    assert_refused(invoke("generate", "--config", tmp_path / "job.yaml", "--output", tmp_path / "out"), message)


def test_flags_win_over_yaml(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("max_tokens: 7\ntemperature: 1\nprompts: [a.jsonl, b.jsonl]\nkeep_columns: all\n")
    config = GenerateJobConfig.from_yaml(str(path), {"max_tokens": 9})
    assert (config.max_tokens, config.temperature, config.keep_columns) == (9, 1.0, "all")
    assert config.prompts == ["a.jsonl", "b.jsonl"]


def test_the_flags_and_the_fields_are_the_same() -> None:
    help_text = invoke("generate", "--help").output
    for name in GenerateJobConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in help_text


def test_sampling_and_engine_fields_reach_their_configs() -> None:
    values: dict[str, Any] = {
        "max_tokens": 5, "temperature": 0.3, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1,
        "min_tokens": 2, "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True, "seed": 8,
    }  # fmt: skip
    params = GenerateJobConfig.build(values).sampling_params()
    assert {name: getattr(params, name) for name in values} == {**values, "stop": ("x",), "stop_token_ids": (3,)}
    values = {
        "dtype": "float32", "device": "cpu", "revision": "main", "trust_remote_code": True, "max_num_seqs": 3,
        "max_model_len": 64, "max_num_batched_tokens": 32, "policy": "static", "skip_layers": [1], "num_threads": 2,
        "prefix_caching": False,
    }  # fmt: skip
    engine = GenerateJobConfig.build(values).engine_config()
    assert {name: getattr(engine, name) for name in values} == {**values, "skip_layers": (1,)}


def test_wrong_types_from_python_are_user_errors() -> None:
    with pytest.raises(UserError, match="num_actors: input should be a valid integer, got True"):
        GenerateJobConfig.build({"num_actors": True})


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "address: nobody answers at '127.0.0.1:1': [Errno 111]"),
        ("ray://127.0.0.1:1", "address: nobody answers at 'ray://127.0.0.1:1'"),
        ("127.0.0.1:many", "address: nobody answers at '127.0.0.1:many'"),
        ("somewhere", "address must be local, auto, HOST:PORT or ray://HOST:PORT, got 'somewhere'"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(UserError) as error, connected(address):
        pass
    assert str(error.value).startswith(message)


def test_an_unknown_flag_is_a_usage_error() -> None:
    assert invoke("generate", "--no-such-flag").exit_code == 2


def test_version_is_printed() -> None:
    assert invoke("--version").output.strip() == __version__


def test_help_imports_neither_torch_nor_ray() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom tide_ray.cli import app\n"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_job_entry_point_is_the_same_command(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "jobs" / "generate.py"
    done = subprocess.run(
        [sys.executable, script, "--prompts", "absent.jsonl", "--output", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: prompts: file not found: 'absent.jsonl'"


@pytest.mark.parametrize(
    ("kernels", "message"),
    [("Torch", "TIDE_KERNELS must be torch or cuda"), ("cuda", "TIDE_KERNELS=cuda, but the driver is missing")],
)
def test_kernels_that_cannot_be_had_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernels: str, message: str
) -> None:
    monkeypatch.setenv("TIDE_KERNELS", kernels)
    monkeypatch.setattr("tide_ray.models.loading.resolve_device", lambda _device: torch.device("cuda", 0))
    monkeypatch.setattr("tide_kernels.gpu.why_not", lambda _index: "the driver is missing")
    result = invoke("import-tide", tmp_path / "router.pt", "--dtype", "bfloat16", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {message}")
    assert result.output.count("\n") == 1


def test_a_job_that_no_certificate_holds_for_is_refused_before_ray_starts(tmp_path: Path, prompts: Path) -> None:
    routers = tmp_path / "routers"
    make_routers(loaded(build_tiny_model("llama")), (1, 3)).save(routers)

    def refused(*flags: str) -> str:
        arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--exits", routers, *flags)
        result = invoke("generate", *arguments)
        assert_refused(result)
        assert not (tmp_path / "out").exists()
        return result.stderr

    asked = ("--max-disagreement", "0.02", "--max-tokens", "32")
    assert "no certificate of tokens for it (none; tide-ray certify adds them), got 0.02" in refused(*asked)
    add_certificates(routers, [make_certificate(routers, epsilon=0.02)], {})
    assert "no certificate of tokens for it (0.02), got 0.01" in refused("--max-disagreement", "0.01")
    assert "answers of up to 32 tokens, got 128" in refused("--max-disagreement", "0.02")
    assert "certified for 0.0 only, got 0.7" in refused(*asked, "--temperature", "0.7")
    assert "kv_policy: max_disagreement is certified for 'fitted' only" in refused(*asked, "--kv-policy", "copy")
    assert "dtype: max_disagreement is certified for 'float32' only, got 'bfloat16'" in refused(
        *asked, "--dtype", "bfloat16"
    )


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("certify", [], "exits must be a router checkpoint"),
        ("certify", ["--epsilons", "1%"], "epsilons must be numbers separated by commas, got '1%'"),
        ("certify", ["--epsilons", "0"], "epsilons must lie between 0 and 1, got [0.0]"),
        ("certify", ["--delta", "0"], "delta: input should be greater than 0, got 0.0"),
        ("certify", ["--p-value", "binomial"], "p_value 'binomial' needs losses of 0 or 1, got loss 'tokens'"),
        ("certify", ["--config", "absent.yaml"], "config: cannot read 'absent.yaml'"),
        ("evaluate", [], "exits must be a router checkpoint"),
        ("evaluate", ["--exit-errors", "x"], "exit_errors must be numbers separated by commas, got 'x'"),
        ("evaluate", ["--output", "no/such/folder/x.json"], "output must be a file in a folder that exists"),
    ],
)
def test_mistakes_in_certification_and_evaluation_are_one_line(command: str, flags: list[str], message: str) -> None:
    assert_refused(invoke(command, "no-such-checkpoint", *flags), message)


@pytest.mark.parametrize(("command", "config"), [("certify", CertificationConfig), ("evaluate", EvaluationConfig)])
def test_flags_of_checkpoint_commands_are_their_fields(command: str, config: type[CheckpointPrompts]) -> None:
    help_text = invoke(command, "--help").output
    for name in set(config.model_fields) - {"routers"}:
        assert f"--{name.replace('_', '-')}" in help_text
