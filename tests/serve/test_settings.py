"""What the command may be told, before anything starts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tide_ray.cli import app
from tide_ray.serve.config import LLMServingArgs
from tide_ray.serve.keys import ENVIRONMENT_VARIABLE, KeyRing, new_key, stored
from tide_ray.serve.settings import ServeSettings
from tide_ray.types import UserError

ENTRY = stored("alice", new_key())
EXAMPLE = Path(__file__).parents[2] / "cluster" / "serve.yaml"


def args(config: str | None = None, **values: Any) -> LLMServingArgs:
    return ServeSettings.build(values).serving_args(config)


def test_without_flags_the_demo_model_is_served_to_this_machine_alone() -> None:
    found = args()
    assert [(config.model_id, config.model_source) for config in found.llm_configs] == [("demo", "demo")]
    assert ServeSettings.build({}).url == "http://127.0.0.1:8000"
    assert found.ingress_cls_config.loopback_only
    assert not found.ingress_cls_config.require_api_key


def test_models_have_names_and_the_settings_of_the_flags(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    found = args(model=[str(folder), "small=org/big-name"], max_num_seqs=7, num_replicas=2, max_queued_requests=9)
    assert [config.model_id for config in found.llm_configs] == ["my-model", "small"]
    for config in found.llm_configs:
        assert config.engine_config.max_num_seqs == 7
        assert config.deployment_config["num_replicas"] == 2
        assert config.max_queued_requests == 9


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_addresses_need_a_key(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^host: .* an API key is required"):
        args(host=host)
    (tmp_path / "keys").write_text(ENTRY + "\n")
    assert not args(host=host, api_keys_file=str(tmp_path / "keys")).ingress_cls_config.loopback_only
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, new_key())
    assert args(host=host).ingress_cls_config.require_api_key


def test_a_file_cannot_turn_the_need_for_a_key_off(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("ingress_cls_config: {require_api_key: false}\n")
    with pytest.raises(UserError, match="API key is required"):
        args(str(path), host="0.0.0.0")
    assert args(str(path))


WRONG = [
    ({"port": 0}, "port"),
    ({"port": "x"}, "port"),
    ({"model": ["a b"]}, "model_id"),
    ({"model": ["demo", "demo"]}, "model_id must be unique"),
    ({"dtype": "int3"}, "dtype"),
    ({"max_num_seqs": 0}, "max_num_seqs"),
    ({"max_disagreement": 0.1}, "max_disagreement needs exits"),
    ({"max_body_bytes": 0}, "max_body_bytes"),
    ({"ssl_keyfile": "x"}, "ssl_keyfile and ssl_certfile"),
    ({"ssl_keyfile": "none.pem", "ssl_certfile": "none.pem"}, "ssl_keyfile: no such file"),
    ({"api_keys_file": "none"}, "api_keys_file"),
    ({"unknown": 1}, "unknown"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_one_line_that_names_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        args(**values)
    assert "\n" not in str(caught.value)


FILES = [
    ("llm_configs: []\n", "llm_configs"),
    ("llm_configs: [{model_loading_config: {}}]\n", "model_id"),
    ("llm_configs: [{model_loading_config: {model_id: x}, engine_kwargs: {max_seqs: 1}}]\n", "max_seqs"),
    ("llm_configs: [{model_loading_config: {model_id: x}, deployment_config: {replicas: 1}}]\n", "replicas"),
    ("llm_configs: [{model_loading_config: {model_id: x}, lora: 1}]\n", "lora"),
    ("ingress_cls_config: {api_keys: [plain-text-key]}\n", "NAME:sha256:HEX"),
    ("llm_config: []\n", "llm_config"),
    ("- 1\n", "mapping"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[message for _, message in FILES])
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        args(str(path))
    assert "\n" not in str(caught.value)
    assert "plain-text-key" not in str(caught.value)


def test_a_file_and_model_flags_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("llm_configs: [{model_loading_config: {model_id: demo}}]\n")
    assert args(str(path), max_body_bytes=5).ingress_cls_config.max_body_bytes == 5
    with pytest.raises(UserError, match="exclude each other"):
        args(str(path), model=["demo"])


def test_the_example_is_a_serve_config_that_the_command_takes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(EXAMPLE.read_text()))
    [application] = schema.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    found = args(str(EXAMPLE))
    assert found == args_of(application.args).model_copy(update={"ingress_cls_config": found.ingress_cls_config})
    assert found.llm_configs[0].model_id == "demo"
    # Behind a config file nobody knows the address, so that a key is needed whatever it is.
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(UserError, match="a key is required"):
        getattr(importlib.import_module(module), name)(application.args)


def args_of(values: dict[str, Any]) -> LLMServingArgs:
    return LLMServingArgs.build(values)


def test_the_command_refuses_with_exit_code_two(tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    tls = ["--ssl-keyfile", none, "--ssl-certfile", none]
    for flags in (["--host", "0.0.0.0"], ["--model", none], ["--max-num-seqs", "0"], tls):
        result = CliRunner().invoke(app, ["serve", *flags])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_the_key_command_prints_a_key_that_its_file_knows(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    result = CliRunner().invoke(app, ["api-key", "dave", "--file", str(path)])
    assert result.exit_code == 0
    assert KeyRing([path.read_text().strip()]).owner(result.stdout.strip()) == "dave"
    shown = CliRunner().invoke(app, ["api-key", "erin"])
    assert KeyRing([shown.stderr.strip()]).owner(shown.stdout.strip()) == "erin"
    assert CliRunner().invoke(app, ["api-key", "no name"]).exit_code == 2
