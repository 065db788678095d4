"""Servers that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from exit_helpers import make_certificate, make_routers
from serving import EXITING, MODEL, Running, llm_config, running
from tide_ray.exits.checkpoint_files import add_certificates
from tide_ray.models.loading import load_as
from tide_ray.serve.backend import Limits
from tide_ray.serve.model_server import ModelServer


@pytest.fixture(scope="session")
def routers_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights for the tiny llama, with a made-up certificate for 5 %."""
    folder = tmp_path_factory.mktemp("routers") / "routers"
    config = llm_config(MODEL, tiny_llama_folder).engine_config
    make_routers(load_as(str(tiny_llama_folder), config), (2,)).save(folder)
    add_certificates(folder, [make_certificate(folder, epsilon=0.05, thresholds=(0.4,), max_tokens=24)], {})
    return folder


@pytest.fixture(scope="session")
def make_model(tiny_llama_folder: Path) -> Iterator[Callable[..., ModelServer]]:
    """Makes a model server of the tiny llama; closed at the end."""
    made = []

    def make(name: str = MODEL, limits: Limits | None = None, **values: Any) -> ModelServer:
        made.append(ModelServer(llm_config(name, tiny_llama_folder, **values), limits))
        return made[-1]

    yield make
    for model in made:
        model.close()


@pytest.fixture(scope="session")
def live(make_model: Callable[..., ModelServer], routers_folder: Path) -> Iterator[Running]:
    """Two models in one application, one with exits."""
    exits = {"exits": str(routers_folder), "exits_when": "always"}
    with running({MODEL: make_model(), EXITING: make_model(EXITING, engine=exits)}) as found:
        yield found


@pytest.fixture
def client(live: Running) -> Iterator[openai.OpenAI]:
    with live.client() as made:
        yield made
