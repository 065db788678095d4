"""Calibration on text against the recipe of TIDE v0.2.1 (arXiv 2603.21365), on the same samples, model and machine.

The recipe: run the samples through the model in padded batches of 8 with all hidden states, keep every fourth layer's
states of all tokens, label a token converged where its cosine with the last state exceeds 0.98, and train one router
per layer on all of its states at once, 100 epochs of Adam. Each side runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.corpus import read_lines
from tide_ray.exits.checkpoint import Routers
from tide_ray.models import load
from tide_ray.types import UserError

INTERVAL, BATCH, MAX_LENGTH, EPOCHS = 4, 8, 512, 100
CONVERGED = 0.98
BOTTLENECK, LEARNING_RATE = 128, 1e-3


def run_calibration(
    text: str, *, model: str, dtype: str, samples: int, max_tokens: int, epochs: int, num_threads: int
) -> dict[str, Any]:
    """Time both; the recipe's training time is scaled to its 100 epochs when ``epochs`` are fewer.

    ``max_tokens``: of each sample that ours reads; the recipe reads 512.

    Raises:
        UserError: the text cannot be read, or has too few samples.
    """
    lines = [line.strip() for line in read_lines(text)]
    chosen = [line for line in lines if len(line) > 100][:samples]
    if len(chosen) < samples:
        raise UserError(f"samples: {text!r} has {len(chosen)} lines of more than 100 characters, got {samples}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.txt"
        file.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        settings = {"model": model, "dtype": dtype, "text": str(file), "num_prompts": samples, "max_tokens": max_tokens}
        theirs = _in_process(_recipe, {**settings, "epochs": epochs, "num_threads": num_threads})
        ours = _in_process(_ours, {**settings, "output": str(Path(folder) / "out"), "num_threads": num_threads})
    return {
        "model": model,
        "dtype": dtype,
        "text": Path(text).name,
        "samples": samples,
        "max_tokens": max_tokens,
        "recipe": theirs,
        "ours": ours,
        "ratio": round(theirs["seconds"] / ours["seconds"], 2),
    }


def _in_process(work: Callable[[dict[str, Any]], dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, settings, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        facts: dict[str, Any] = json.loads(ours.recv())
    except EOFError:
        raise UserError("calibration: a measured process died, see its message above") from None
    finally:
        process.join()
    return facts


def _report(work: Callable[[dict[str, Any]], dict[str, Any]], settings: dict[str, Any], pipe: Any) -> None:
    torch.set_num_threads(settings["num_threads"])
    facts = work(settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pipe.send(json.dumps({**facts, "peak_gib": round(peak, 2)}))


def _ours(settings: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    routers = calibrate(CalibrationConfig.build(settings))
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "tokens": routers.facts.training["tokens"],
        "parts": routers.facts.metrics["seconds"],
        "boundaries": list(Routers.load(settings["output"]).depths),
    }


def _recipe(settings: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    loaded = load(settings["model"], dtype=settings["dtype"])
    loading = time.perf_counter() - start
    texts = Path(settings["text"]).read_text(encoding="utf-8").splitlines()
    states, labels = _collect(loaded.model, loaded.tokenizer, texts)
    collected = time.perf_counter()
    torch.manual_seed(0)
    for layer, layer_states in states.items():
        _train(layer_states.float(), labels[layer], settings["epochs"])
    training = time.perf_counter() - collected
    scaled = training * EPOCHS / settings["epochs"]
    collecting = collected - start - loading
    return {
        "seconds": round(loading + collecting + scaled, 1),
        "collecting": round(collecting, 1),
        "training": round(scaled, 1),
        "epochs_run": settings["epochs"],
        "tokens": len(next(iter(states.values()))),
        "layers": [layer + 1 for layer in states],
        "converged": {layer + 1: round(float(label.mean()), 4) for layer, label in labels.items()},
    }


@torch.no_grad()
def _collect(model: Any, tokenizer: Any, texts: list[str]) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """States of all tokens at every fourth layer, and whether each has converged."""
    layers = range(INTERVAL - 1, model.config.num_hidden_layers, INTERVAL)
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    finals: list[torch.Tensor] = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH], return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
        )
        hidden = model(**batch, output_hidden_states=True, return_dict=True).hidden_states
        is_token = batch["attention_mask"].bool()
        for layer in layers:
            parts[layer].append(hidden[layer + 1][is_token])
        finals.append(hidden[-1][is_token])
    states = {layer: torch.cat(rows) for layer, rows in parts.items()}
    final = torch.cat(finals).float()
    labels = {
        layer: (torch.cosine_similarity(rows.float(), final, dim=-1) > CONVERGED).float()
        for layer, rows in states.items()
    }
    return states, labels


def _train(states: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    router = nn.Sequential(
        nn.Linear(states.shape[1], BOTTLENECK, bias=False),
        nn.SiLU(),
        nn.Linear(BOTTLENECK, 1, bias=False),
        nn.Sigmoid(),
    )
    optimizer = torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy(router(states).squeeze(-1), labels).backward()
        optimizer.step()
