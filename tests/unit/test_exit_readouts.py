"""Exit heads, KV heads, rotary layouts and checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from exit_helpers import make_routers
from references import loaded
from tide_ray import EngineConfig, TideEngine, UserError
from tide_ray.exits.checkpoint import FINGERPRINT, Routers
from tide_ray.exits.checkpoint_files import FACTS_FILE, WEIGHTS_FILE
from tide_ray.exits.readouts import unit_rms
from tide_ray.exits.rotary import CANDIDATES, find_rotary
from tide_ray.models.adapter import Adapter
from tide_ray.models.row_cache import KeyValueTap
from tiny_models import TINY_ARCHITECTURES, build_tiny_model

LAYOUTS = {"gpt2": "none", "opt": "none"}


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_the_rotation_of_every_architecture_is_found(arch: str) -> None:
    adapter = Adapter(build_tiny_model(arch))
    kinds = find_rotary(adapter)
    assert kinds is not None
    assert {kind.layout for kind in kinds} == {LAYOUTS.get(arch, "half")}


@pytest.mark.parametrize("kind", CANDIDATES[1:], ids=str)
def test_unrotating_undoes_rotating_also_for_scaled_tables_and_partial_widths(kind: object) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(5, 2, 3, 12, generator=generator)
    angles = torch.randn(5, 4, generator=generator)
    is_paired = kind.layout == "interleaved" and not kind.repeats  # type: ignore[attr-defined]
    wide = angles.repeat_interleave(2, dim=-1) if is_paired else torch.cat((angles, angles), dim=-1)
    cos, sin = 1.3 * wide.cos(), 1.3 * wide.sin()
    rotated = kind.rotate(key, cos, sin)  # type: ignore[attr-defined]
    assert not torch.allclose(rotated, key)
    torch.testing.assert_close(rotated[..., 8:], key[..., 8:])
    torch.testing.assert_close(kind.unrotate(rotated, cos, sin), key)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_a_tap_sees_the_keys_and_values_that_a_cache_would_hold(arch: str) -> None:
    model = build_tiny_model(arch)
    adapter = Adapter(model)
    ids = torch.tensor([5, 9, 13, 21])
    with torch.inference_mode():
        with adapter.native_attention():
            output = adapter.backbone(input_ids=ids[None], use_cache=True, output_hidden_states=True)
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        tap = KeyValueTap()
        _, calls = adapter.prologue(ids, torch.arange(4), tap)
        for layer in range(adapter.num_layers):
            key, value = adapter.keys_values(layer, output.hidden_states[layer], calls[layer], tap)
            expected = cache.layers[layer]
            torch.testing.assert_close(key[-1], expected.keys[0, :, -1], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(value[-1], expected.values[0, :, -1], rtol=1e-3, atol=1e-4)


def test_unit_rms_is_what_its_name_says() -> None:
    states = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 30
    torch.testing.assert_close(unit_rms(states).square().mean(-1).sqrt(), torch.ones(7), rtol=1e-4, atol=1e-4)
    assert unit_rms(states.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(unit_rms(states), unit_rms(states * 5))


# ---- checkpoints ----


@pytest.fixture
def routers() -> Routers:
    return make_routers(loaded(build_tiny_model("llama")), (1, 3))


@pytest.fixture
def folder(routers: Routers, tmp_path: Path) -> Path:
    routers.save(tmp_path / "routers")
    return tmp_path / "routers"


def test_a_checkpoint_comes_back_as_it_was_saved(routers: Routers, folder: Path) -> None:
    again = Routers.load(folder)
    assert again.depths == (1, 3)
    assert again.facts == routers.facts
    assert again.identity == routers.identity
    for before, after in zip(routers.boundaries, again.boundaries, strict=True):
        assert (before.thresholds, before.score_quantiles) == (after.thresholds, after.score_quantiles)
        assert before.modules().keys() == after.modules().keys()
        for name, module in before.modules().items():
            for key, tensor in module.state_dict().items():
                assert torch.equal(tensor, after.modules()[name].state_dict()[key])


def test_saving_again_replaces_a_checkpoint_and_nothing_else(routers: Routers, folder: Path, tmp_path: Path) -> None:
    routers.save(folder)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("irreplaceable")
    with pytest.raises(UserError, match="not a router checkpoint is in the way"):
        routers.save(other)
    assert (other / "chapter1.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize("name", [name for name in FINGERPRINT if name != "hidden_size"])  # weights tell that
def test_a_checkpoint_for_something_else_is_refused_by_the_name_of_the_field(folder: Path, name: str) -> None:
    facts = json.loads((folder / FACTS_FILE).read_text())
    value = facts[name]
    facts[name] = value + 1 if isinstance(value, int) else "copy" if name == "kv_policy" else f"other-{value}"
    if name == "num_layers":
        facts["kv_shapes"].append(facts["kv_shapes"][-1])
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    config = EngineConfig(dtype="float32", max_model_len=32, exits=str(folder), kv_policy="fitted")
    with pytest.raises(UserError, match=rf"exits: (?:{name}|a damaged)"):
        TideEngine(loaded(build_tiny_model("llama")), config)


def test_damaged_checkpoints_are_refused_in_one_line(folder: Path) -> None:
    weights = (folder / WEIGHTS_FILE).read_bytes()
    facts = json.loads((folder / FACTS_FILE).read_text())

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            Routers.load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (folder / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    assert "damaged" in refusal()
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps({"depth_1.gate": 1}))
    assert "damaged" in refusal()
    (folder / WEIGHTS_FILE).write_bytes(weights)
    for change, message in (
        ({"hidden_size": 32}, "damaged"),
        ({"format": "pickle"}, "format: expected"),
        ({"boundaries": []}, "boundaries must rise"),
    ):
        (folder / FACTS_FILE).write_text(json.dumps({**facts, **change}))
        assert message in refusal()
    (folder / FACTS_FILE).write_text("{")
    assert "not JSON" in refusal()
    (folder / FACTS_FILE).unlink()
    assert "must be a router checkpoint" in refusal()
