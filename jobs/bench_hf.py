"""HuggingFace's own generation, as contenders: ``generate`` in static batches, and ``generate_batch``.

An answer ends with its first EOS; padding after it is not counted.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from tide_ray.models import LoadedModel


@torch.inference_mode()
def static_batches(
    loaded: LoadedModel, prompts: list[list[int]], max_tokens: int, batch_size: int, by_length: bool
) -> list[list[int]]:
    """``generate`` on left-padded batches of ``batch_size``, in the given order or sorted ``by_length``."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if by_length else list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        output = loaded.model.generate(  # type: ignore[operator]
            ids.to(loaded.device), attention_mask=mask.to(loaded.device), generation_config=_greedy(loaded, max_tokens)
        )
        for i, row in zip(batch, output[:, width:].tolist(), strict=True):
            ends = [n for n, token in enumerate(row) if token in loaded.eos_token_ids]
            answers[i] = row[: ends[0] + 1] if ends else row
    return answers


def continuous_batching(loaded: LoadedModel, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """``generate_batch``, which switches ``loaded`` to its paged attention: give it a model of its own."""
    outputs = loaded.model.generate_batch(inputs=prompts, generation_config=_greedy(loaded, max_tokens))  # type: ignore[operator]
    answers = [list(output.generated_tokens) for output in outputs.values()]
    failed = [output.error for output in outputs.values() if output.error]
    if failed or len(answers) != len(prompts):
        raise RuntimeError(f"generate_batch answered {len(answers)} of {len(prompts)} prompts: {failed[:1]}")
    return answers


def _greedy(loaded: LoadedModel, max_tokens: int) -> GenerationConfig:
    eos = list(loaded.eos_token_ids)
    return GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0
    )
