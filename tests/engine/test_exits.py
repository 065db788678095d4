"""Early exit in the engine: layers really skipped, K/V as promised, answers that do not hang on how rows are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exit_helpers import NUM_LAYERS, forced_engine
from references import Interrupt, assert_idle, forward_logits, greedy, ragged_prompts, tokens
from tide_ray import SamplingParams, TideEngine
from tide_ray.exits.readouts import unit_rms
from tiny_models import VOCAB_SIZE, build_tiny_model

PARAMS = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
KV_POLICIES = ("fitted", "copy", "deferred")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(9, VOCAB_SIZE, longest=20)


def params_with_seeds(num: int) -> list[SamplingParams]:
    """A request's forced exits follow from its seed, so that engines can be compared request by request."""
    return [SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, seed=i) for i in range(num)]


def generate(engine: TideEngine, prompts: list[list[int]]) -> list[Any]:
    outputs = engine.generate(prompts, params_with_seeds(len(prompts)))
    assert_idle(engine)
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize(("holds", "compiled"), [((1, 1), "auto"), ((3, 2), "off")])
def test_rows_through_every_layer_are_prompts_and_tokens_that_went_deeper(
    prompts: list[list[int]], kv_policy: str, holds: tuple[int, int], compiled: str
) -> None:
    model = build_tiny_model("llama")
    engine = forced_engine(model, (1, 3), (0.4, 0.5), kv_policy=kv_policy, holds=holds, compile=compiled)
    seen = [0] * NUM_LAYERS

    def counter(layer: int) -> Any:
        def count(_module: object, args: Any, kwargs: Any) -> None:
            seen[layer] += (args[0] if args else kwargs["hidden_states"]).shape[1]

        return count

    adapter = engine.runner.adapter
    assert len(adapter.fused_layers) == (NUM_LAYERS if compiled == "auto" else 0)
    for layer, module in enumerate(adapter.running_layers):
        module.register_forward_pre_hook(counter(layer), with_kwargs=True)
    answers = generate(engine, prompts)
    depths = [depth for answer in answers for depth in answer.exit_layers[1:]]  # the first comes from the prompt
    assert {1, 3, 4} == set(depths)
    deferred = [engine.stats.deferred_rows.get(f"stage_{stage}", 0) for stage in (0, 1, 1, 2)]
    assert bool(sum(deferred)) == (kv_policy == "deferred")
    num_prompt = sum(map(len, prompts))
    expected = [num_prompt + sum(depth > layer for depth in depths) + deferred[layer] for layer in range(NUM_LAYERS)]
    if kv_policy == "copy":  # filling K/V enters a layer, and leaves it before attention
        fills = [num_prompt * 0 + sum(depth <= layer for depth in depths) for layer in range(NUM_LAYERS)]
        assert seen == [rows + filled for rows, filled in zip(expected, fills, strict=True)]
    else:
        assert seen == expected
    assert engine.stats.rows_through_layer == expected
    assert engine.stats.sum_exit_layers == sum(depths) + NUM_LAYERS * len(prompts)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 9, "max_num_batched_tokens": 7},
        {"max_num_seqs": 5, "holds": (3, 1)},
        {"max_num_seqs": 9, "holds": (2, 4)},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_batches_chunks_or_launch_policy(
    prompts: list[list[int]], kv_policy: str, limits: dict[str, Any]
) -> None:
    model = build_tiny_model("llama")
    at_once = generate(forced_engine(model, (1, 3), (0.4, 0.5), kv_policy=kv_policy), prompts)
    other = generate(forced_engine(model, (1, 3), (0.4, 0.5), kv_policy=kv_policy, **limits), prompts)
    assert [a.token_ids for a in other] == [a.token_ids for a in at_once]
    assert [a.exit_layers for a in other] == [a.exit_layers for a in at_once]
    assert all(len(a.token_ids) == len(a.exit_layers) == len(a.token_times_us) == 14 for a in other)
    assert all(time >= 0 for a in other for time in a.token_times_us)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_a_boundary_that_nobody_exits_at_changes_nothing(prompts: list[list[int]], kv_policy: str) -> None:
    model = build_tiny_model("llama")
    expected = [greedy(model, prompt, PARAMS.max_tokens) for prompt in prompts]
    engine = forced_engine(model, (1, 3), (0.0, 0.0), kv_policy=kv_policy, holds=(2, 1))
    answers = generate(engine, prompts)
    assert [answer.token_ids for answer in answers] == expected
    assert {depth for answer in answers for depth in answer.exit_layers} == {NUM_LAYERS}


def test_with_deferred_kv_every_token_is_what_an_exact_cache_gives(prompts: list[list[int]]) -> None:
    """Deep tokens equal the model's own choice for their prefix; exits equal the head on its own shallow states."""
    model = build_tiny_model("llama")
    engine = forced_engine(model, (1, 3), (0.4, 0.5), kv_policy="deferred", holds=(2, 1))
    heads = {boundary.depth: boundary.head for boundary in engine.runner.exits.boundaries}  # type: ignore[union-attr]
    answers = generate(engine, prompts)
    num_checked = {1: 0, 3: 0, NUM_LAYERS: 0}
    with engine.runner.adapter.native_attention():
        for prompt, answer in zip(prompts, answers, strict=True):
            for n, (token, depth) in enumerate(zip(answer.token_ids, answer.exit_layers, strict=True)):
                prefix = prompt + answer.token_ids[:n]
                if depth == NUM_LAYERS:
                    logits = forward_logits(model, prefix)[-1]
                else:
                    with torch.inference_mode():
                        states = model(torch.tensor([prefix]), output_hidden_states=True, use_cache=False).hidden_states
                        logits = model.lm_head(model.model.norm(heads[depth](unit_rms(states[depth][0, -1]))))
                assert int(logits.argmax()) == token
                num_checked[depth] += 1
    assert min(num_checked.values()) > 10


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_exits_of_a_model_whose_later_layers_do_nothing_change_no_token(
    prompts: list[list[int]], kv_policy: str
) -> None:
    """With a perfect head every token exits and every answer is full depth's."""
    model = build_tiny_model("llama")
    with torch.no_grad():
        for layer in list(model.model.layers)[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    expected = [greedy(model, prompt, PARAMS.max_tokens) for prompt in prompts]
    engine = forced_engine(model, (2,), (1.0,), kv_policy=kv_policy, is_identity=True)
    answers = generate(engine, prompts)
    assert [answer.token_ids for answer in answers] == expected
    assert all(answer.exit_layers == [NUM_LAYERS] + [2] * 13 for answer in answers)
    assert engine.stats.rows_through_layer[3] == sum(map(len, prompts))


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("holds", [(1, 1), (3, 1)])
def test_a_preempted_answer_is_computed_again_with_the_same_exits(
    prompts: list[list[int]], kv_policy: str, holds: tuple[int, int]
) -> None:
    """Computed again at full depth, the K/V of tokens that had exited would have differed, and so the answer."""
    model = build_tiny_model("llama")
    options: dict[str, Any] = {"kv_policy": kv_policy, "holds": holds, "max_num_seqs": 6}
    plenty = generate(forced_engine(model, (1, 3), (0.4, 0.5), **options), prompts)
    engine = forced_engine(model, (1, 3), (0.4, 0.5), max_model_len=36, **options)
    pool = engine.scheduler.pool
    taken = pool.allocate(pool.num_free - 14)
    starved = engine.generate(prompts, params_with_seeds(len(prompts)))
    assert engine.stats.num_preemptions > 0
    assert tokens(starved) == [answer.token_ids for answer in plenty]
    assert [o.outputs[0].exit_layers for o in starved] == [answer.exit_layers for answer in plenty]
    assert taken is not None


def run_out(engine: TideEngine) -> dict[str, list[int]]:
    """Step until nothing is left; the answers by request."""
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    return done


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("num_launches", [1, 6])
def test_a_failed_launch_can_be_run_again(prompts: list[list[int]], kv_policy: str, num_launches: int) -> None:
    """States that were to go deeper with the launch were once gone with it, and later tokens had no K/V for them."""
    model = build_tiny_model("llama")
    options: dict[str, Any] = {"kv_policy": kv_policy, "holds": (3, 2)}
    calm = generate(forced_engine(model, (1, 3), (0.4, 0.5), **options), prompts)
    engine = forced_engine(model, (1, 3), (0.4, 0.5), **options)
    for number, params in enumerate(params_with_seeds(len(prompts))):
        engine.add_request(str(number), prompts[number], params)
    Interrupt(engine, num_launches, RuntimeError)
    with pytest.raises(RuntimeError, match="interrupted"):
        run_out(engine)
    done = run_out(engine)
    assert [done[str(number)] for number in range(len(prompts))] == [answer.token_ids for answer in calm]
    assert_idle(engine)


def test_skipped_layers_hold_what_fitted_and_copied_kv_should_be() -> None:
    model = build_tiny_model("llama")
    prompt = [7, 8, 9, 10, 11]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for kv_policy in ("fitted", "copy"):
        engine = forced_engine(model, (2,), (1.0,), kv_policy=kv_policy)
        pools = engine.runner.pools
        adapter = engine.runner.adapter
        out = engine.generate([prompt], params)[0].outputs[0]
        sequence = prompt + out.token_ids[:1]
        position = len(prompt)
        with adapter.native_attention(), torch.inference_mode():
            states = model(torch.tensor([sequence]), output_hidden_states=True, use_cache=False).hidden_states[2][0, -1]
        page, offset = 0 + position // 4, position % 4
        boundary = engine.runner.exits.boundaries[0]  # type: ignore[union-attr]
        cos, sin = model.model.rotary_emb(states[None, None], torch.tensor([[position]]))
        for layer in (2, 3):
            attention = model.model.layers[layer].self_attn
            if kv_policy == "fitted":
                flat = boundary.kv_head(unit_rms(states)[None])[0]  # type: ignore[misc]
                key, value = flat[(layer - 2) * 64 :][:64].view(2, 2, 16)
            else:
                normed = model.model.layers[layer].input_layernorm(states)
                key, value = attention.k_proj(normed).view(2, 16), attention.v_proj(normed).view(2, 16)
            half = torch.cat((-key[:, 8:], key[:, :8]), dim=-1)
            rotated = key * cos[0] + half * sin[0]
            torch.testing.assert_close(pools.key_pools[layer][page, :, offset], rotated, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pools.value_pools[layer][page, :, offset], value, rtol=1e-4, atol=1e-5)
