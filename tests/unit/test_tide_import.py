"""A router.pt of TIDE as a router checkpoint: the same scores, the same choices, nothing executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from references import loaded
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.cli import app
from tide_ray.exits.checkpoint import Routers
from tide_ray.exits.readouts import unit_rms
from tide_ray.exits.tide_import import import_tide
from tiny_models import build_tiny_model, save_tiny_model

LAYERS = (0, 2, 3)  # the last of four layers among them, as TIDE writes it
THRESHOLD = 0.5


def write_router(path: Path, width: int, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(1)
    layers = {
        layer: {
            "down.weight": torch.randn(8, width, generator=generator) / width**0.5,
            "up.weight": torch.randn(1, 8, generator=generator),
        }
        for layer in LAYERS
    }
    torch.save({"hidden_dim": width, "bottleneck_dim": 8, "router_layers": layers, **changes}, path)
    return path


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = build_tiny_model("llama")
    with torch.no_grad():
        made.model.norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return made


def scores_by_tide(path: Path, model: PreTrainedModel, layer: int, states: torch.Tensor) -> torch.Tensor:
    state = torch.load(path, weights_only=True)["router_layers"][layer]
    hidden = torch.nn.functional.silu(model.model.norm(states) @ state["down.weight"].T)
    return torch.sigmoid(hidden @ state["up.weight"].T)[..., 0]


def test_scores_are_those_of_the_router_on_the_final_norm_of_the_state(tmp_path: Path, model: PreTrainedModel) -> None:
    path = write_router(tmp_path / "router.pt", model.config.hidden_size)
    routers = import_tide(str(path), loaded(model))
    assert routers.depths == (1, 3), "after the last layer there is nothing left to skip"
    states = 5 * torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for boundary in routers.boundaries:
        expected = scores_by_tide(path, model, boundary.depth - 1, states)
        torch.testing.assert_close(boundary.gate.scores(unit_rms(states)), expected, atol=1e-4, rtol=1e-3)


def test_post_hoc_generation_selects_the_first_state_whose_router_passes(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    path = write_router(tmp_path / "router.pt", model.config.hidden_size)
    import_tide(str(path), loaded(model)).save(tmp_path / "routers")
    config = EngineConfig(
        dtype="float32", exits=str(tmp_path / "routers"), policy="posthoc", exit_threshold=THRESHOLD, max_model_len=64
    )
    engine = TideEngine(loaded(model), config)
    prompt = [5, 9, 17, 4]
    answer = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].outputs[0]
    tokens = list(prompt)
    with torch.inference_mode(), engine.runner.adapter.native_attention():
        for n, (token, depth) in enumerate(zip(answer.token_ids, answer.exit_layers, strict=True)):
            states = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states
            passing = [
                layer + 1
                for layer in LAYERS[:-1]
                if n and float(scores_by_tide(path, model, layer, states[layer + 1][0, -1])) >= THRESHOLD
            ]
            expected = passing[0] if passing else 4
            assert depth == expected
            final = states[depth][0, -1] if depth == 4 else model.model.norm(states[depth][0, -1])
            assert int(model.lm_head(final).argmax()) == token
            tokens.append(token)
    assert len(set(answer.exit_layers)) > 1


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/tide-import-was-executed"),))


def test_what_is_no_router_is_refused_in_one_line_and_never_executed(tmp_path: Path, model: PreTrainedModel) -> None:
    width = model.config.hidden_size
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps(_Evil()))
    cases = [
        (evil, "must be a router.pt of TIDE"),
        (tmp_path / "missing.pt", "must be a file"),
        (write_router(tmp_path / "wide.pt", width + 8), f"hidden_dim must be {width}"),
        (write_router(tmp_path / "empty.pt", width, router_layers={3: {}}), "no router lies before"),
        (
            write_router(tmp_path / "odd.pt", width, router_layers={1: {"w": torch.ones(1)}}),
            "down.weight and up.weight",
        ),
        (write_router(tmp_path / "list.pt", width, router_layers=[1]), "must be a router.pt of TIDE"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            import_tide(str(path), loaded(model))
        assert "\n" not in str(caught.value)
    assert not Path("/tmp/tide-import-was-executed").exists()


def test_a_model_whose_final_norm_centres_states_is_refused(tmp_path: Path) -> None:
    other = build_tiny_model("gpt_neox")
    path = write_router(tmp_path / "router.pt", other.config.hidden_size)
    with pytest.raises(UserError, match="RMSNorm"):
        import_tide(str(path), loaded(other))


def test_the_command_writes_a_checkpoint_and_refuses_a_wrong_file_with_exit_code_2(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    save_tiny_model("llama", tmp_path / "model")  # not the shared model, whose layers an engine has taken over
    path = write_router(tmp_path / "router.pt", model.config.hidden_size)
    options = ["--model", str(tmp_path / "model"), "--dtype", "float32"]
    done = CliRunner().invoke(app, ["import-tide", str(path), *options, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert Routers.load(tmp_path / "out").depths == (1, 3)
    wrong = CliRunner().invoke(
        app, ["import-tide", str(tmp_path / "none.pt"), *options, "--output", str(tmp_path / "x")]
    )
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: router must be a file")
    assert not (tmp_path / "x").exists()
