"""What the engine is compared with: the model's own forward, token by token, and a model whose answers are known."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tide_ray import RequestOutput, SamplingParams, TideEngine
from tide_ray.engine.prefix_cache import PrefixCache, PrefixNode
from tide_ray.models.loading import LoadedModel
from tiny_models import EOS_ID, TOKENIZER_VOCAB_SIZE, build_tiny_model, tiny_tokenizer

CYCLE = "abcdefghijklmnopqrstuvwxyz é日€😀ABCDEFGHIJKLMNOP"
"""No byte occurs twice. ``cycle_model`` follows it, ends it with EOS and starts again."""

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NUM_PROMPTS = 10


def loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_ids: tuple[int, ...] = (EOS_ID,),
) -> LoadedModel:
    """A model in memory, as ``tide_ray.models.load`` would return it."""
    parameter = next(model.parameters())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        fingerprint="0" * 64,
        source="memory",
        revision="local",
        eos_token_ids=eos_token_ids,
        device=parameter.device,
        dtype=parameter.dtype,
    )


def forward_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits ``[T, V]`` of one sequence, by the model's own forward without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]


def greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int, eos: Collection[int] = ()) -> list[int]:
    """The likeliest continuation of one prompt, recomputed from its start for every token; ends with EOS."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(forward_logits(model, token_ids)[-1].argmax()))
        if token_ids[-1] in eos:
            break
    return token_ids[len(prompt) :]


def ragged_prompts(num: int, vocab_size: int, *, longest: int = 30, seed: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def without_layers(model: PreTrainedModel, skipped: Collection[int]) -> PreTrainedModel:
    """A copy of a llama-like model from which layers are deleted."""
    smaller = copy.deepcopy(model)
    kept = [layer for index, layer in enumerate(smaller.model.layers) if index not in skipped]
    smaller.model.layers = torch.nn.ModuleList(kept)
    smaller.config.num_hidden_layers = len(kept)
    return smaller


def cycle_model() -> PreTrainedModel:
    """A tiny llama that answers with what follows the prompt's last character in ``CYCLE``.

    Its layers run but add nothing, and the head holds each token's embedding in its successor's row.
    """
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    chain = [*tiny_tokenizer()(CYCLE)["input_ids"], EOS_ID]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.mul_(0.01)
        model.lm_head.weight[chain[1:] + chain[:1]] = model.model.embed_tokens.weight[chain]
    return model


class Interrupt:
    """Raises from inside a layer of the engine, in the launch after ``num_launches`` more."""

    def __init__(self, engine: TideEngine, num_launches: int, error: type[BaseException]) -> None:
        self.num_left = num_launches
        self.error = error
        self.handle = engine.runner.adapter.running_layers[2].register_forward_pre_hook(self._count)

    def _count(self, _module: object, _args: object) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            self.handle.remove()
            raise self.error("interrupted")


def cached_nodes(cache: PrefixCache) -> list[PrefixNode]:
    """Every page that can be found, parents before children."""
    nodes = list(cache._roots.values())
    for node in nodes:
        nodes += node.children.values()
    return nodes[len(cache._roots) :]


def assert_idle(engine: TideEngine) -> None:
    """Nothing waits, nothing is resident, and every page is free or cached exactly once and held by nobody."""
    assert not engine.has_unfinished_requests()
    assert not engine.scheduler.has_work
    pool = engine.scheduler.pool
    nodes = cached_nodes(pool)
    assert all(node.is_computed and node.ref_count == 0 for node in nodes)
    assert pool.num_idle == len(nodes)
    assert sorted([*pool._free, *(node.page for node in nodes)]) == list(range(pool.num_pages))


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    """The first answer to each prompt."""
    return [output.outputs[0].token_ids for output in outputs]


def greedy_params(**params: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 40, **params})


ENDINGS = {
    "eos": ("A", greedy_params()),
    "length": ("a", greedy_params(max_tokens=7)),
    "several bytes": ("z", greedy_params(max_tokens=20)),
    "cut inside a character": ("z", greedy_params(max_tokens=5)),
    "stop string": ("a", greedy_params(stop=["mno", "jkl"])),
    "stop string of several bytes": ("z", greedy_params(stop="€😀A")),
    "stop string that does not come": ("A", greedy_params(stop="OP!")),
    "stop id": ("a", greedy_params(stop_token_ids=[80])),
    "min_tokens": ("a", greedy_params(stop="c", min_tokens=4)),
}
"""Prompts of ``cycle_model``'s engine and parameters, by what ends the answer or makes its text hard to cut."""
