"""``serve deploy cluster/serve.yaml`` to a cluster that ``ray start`` made: the front behind Ray Serve's own proxy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import yaml

from ports import free_port
from ray_start import RayNodes
from serving import ENGINE
from tide_ray.serve.keys import new_key

pytestmark = pytest.mark.slow

KEY = new_key()
CONFIG = Path(__file__).parents[3] / "cluster" / "serve.yaml"


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    found = RayNodes(for_nodes={"TIDE_RAY_API_KEYS": KEY}, RAY_AUTH_MODE="disabled")
    yield found
    found.close()


def test_serve_deploy_starts_the_application_and_its_streams_pass_the_proxy(
    nodes: RayNodes, tiny_llama_folder: Path
) -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    port = config["http_options"]["port"] = free_port()
    config["http_options"]["host"] = "127.0.0.1"
    [model] = config["applications"][0]["args"]["llm_configs"]
    model["model_loading_config"]["model_source"] = str(tiny_llama_folder)
    model["engine_kwargs"] = ENGINE
    model["deployment_config"]["ray_actor_options"] = {"num_cpus": 1}
    path = nodes.folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")

    dashboard = nodes.start_for_jobs(f"ray start --head --port={nodes.port} --num-cpus=2")
    done = nodes.run(["-m", "ray.serve.scripts", "deploy", path, "--address", dashboard])
    assert done.returncode == 0, done.stderr[-2000:]
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while not _is_up(url):
        assert time.monotonic() < deadline, nodes.run(["-m", "ray.serve.scripts", "status", "-a", dashboard]).stdout
        time.sleep(0.3)
    assert httpx.get(url + "/v1/models").status_code == 401
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        settings = {"model": "demo", "prompt": "x", "max_tokens": 20, "temperature": 0}
        body = {"ignore_eos": True, "tide": {"stream_interval_ms": 0}}
        chunks = list(client.completions.create(**settings, stream=True, extra_body=body))
        whole = client.completions.create(**settings, extra_body={"ignore_eos": True})
    assert len(chunks) > 10
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.HTTPError:
        return False
