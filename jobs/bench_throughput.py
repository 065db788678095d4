"""The throughput benchmark's contenders and rounds. Every figure is generated tokens (EOS included) per second."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_profile import profile_engine

import tide_ray.data
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.models import LoadedModel, load

DEMO_PROMPTS = Path(tide_ray.data.__file__).parent / "demo_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Workload:
    """The same questions for every contender, as the job would ask them."""

    model: str
    dtype: str
    max_tokens: int
    sources: list[str]
    texts: list[str]

    @classmethod
    def read(cls, sources: list[str], *, model: str, dtype: str, max_tokens: int) -> Workload:
        """Read ``FILE`` or ``FILE:N`` JSONL sources and interleave them in proportion to their sizes."""
        named = sources or [str(DEMO_PROMPTS)]
        columns = [_read_source(source) for source in named]
        placed = [((i + 0.5) / len(texts), text) for texts in columns for i, text in enumerate(texts)]
        texts = [text for _, text in sorted(placed, key=lambda item: item[0])]
        return cls(model, dtype, max_tokens, [Path(source).name for source in named], texts)

    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.max_tokens)

    def chats(self) -> list[list[dict[str, str]]]:
        return [[{"role": "user", "content": text}] for text in self.texts]


def _read_source(source: str) -> list[str]:
    path, _, count = source.rpartition(":") if source.rpartition(":")[2].isdigit() else (source, "", "")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"prompts: cannot read JSONL with a prompt column from {path!r}: {error}") from None
    if not texts:
        raise UserError(f"prompts: no rows in {path!r}")
    return texts[: int(count)] if count else texts


@dataclass(slots=True)
class Contender:
    """Something that answers the workload; ``run`` returns the tokens of every answer."""

    name: str
    run: Callable[[], list[list[int]]]
    seconds: list[float]
    num_tokens: int = 0
    answers: list[list[int]] | None = None

    def measure(self) -> None:
        start = time.perf_counter()
        self.answers = self.run()
        self.seconds.append(time.perf_counter() - start)
        self.num_tokens = sum(len(answer) for answer in self.answers)

    def facts(self) -> dict[str, Any]:
        rates = sorted(self.num_tokens / seconds for seconds in self.seconds)
        return {
            "name": self.name,
            "tokens": self.num_tokens,
            "tokens_per_second": round(statistics.median(rates), 1),
            "slowest": round(rates[0], 1),
            "fastest": round(rates[-1], 1),
        }


def run_throughput(
    workload: Workload,
    *,
    rounds: int,
    engine_seqs: list[int],
    hf_batch_sizes: list[int],
    num_threads: int,
    with_ray: bool,
) -> dict[str, Any]:
    """Run everything; returns the facts that are printed and written."""
    torch.set_num_threads(num_threads)
    reference = load(workload.model, dtype=workload.dtype)
    engines = [_make_engine(workload, seqs, num_threads) for seqs in engine_seqs]
    prompts = [
        output.prompt_token_ids for output in engines[0].generate(workload.chats(), SamplingParams(max_tokens=1))
    ]
    ours = [
        Contender(f"tide_ray, {seqs} residents", lambda engine=engine: _answer(engine, workload), [])  # type: ignore[misc]
        for seqs, engine in zip(engine_seqs, engines, strict=True)
    ]
    theirs = [
        Contender(
            f"HF generate, batches of {size}{', by length' if by_length else ''}",
            lambda size=size, by_length=by_length: _hf_answers(
                reference, prompts, workload.max_tokens, size, by_length
            ),  # type: ignore[misc]
            [],
        )
        for size in hf_batch_sizes
        for by_length in ((False, True) if size < len(prompts) else (False,))
    ]
    _hf_answers(reference, prompts[:4], 4, 4, False)  # warm-up; the engines had theirs with the prompts above
    for _ in range(rounds):
        for contender in (*ours, *theirs):
            contender.measure()
    best_ours = max(ours, key=lambda c: c.facts()["tokens_per_second"])
    best_hf = max(theirs, key=lambda c: c.facts()["tokens_per_second"])
    base = best_hf.facts()["tokens_per_second"]
    best = engines[ours.index(best_ours)]
    facts: dict[str, Any] = {
        "benchmark": "throughput",
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("tide-ray", "torch", "transformers", "ray")},
        "model": workload.model,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "num_threads": num_threads,
        "prompts": len(prompts),
        "sources": workload.sources,
        "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "max_tokens": workload.max_tokens,
        "rounds": rounds,
        "contenders": [
            {**c.facts(), "ratio_to_best_hf": round(c.facts()["tokens_per_second"] / base, 2)} for c in (*ours, *theirs)
        ],
        "ratio": round(best_ours.facts()["tokens_per_second"] / base, 2),
        "agreement_with_hf": agreement(best_ours.answers or [], best_hf.answers or []),
        "profile": profile_engine(best, lambda: _answer(best, workload)),
    }
    if with_ray:
        num_residents = best.max_num_seqs
        # The job's own engine must have the machine and its memory to itself.
        del best
        engines.clear()
        ours.clear()
        facts["ray"] = _ray_overhead(workload, num_residents, num_threads, rounds)
    return facts


def _make_engine(workload: Workload, max_num_seqs: int, num_threads: int) -> TideEngine:
    config = EngineConfig(
        dtype=workload.dtype,
        max_num_seqs=max_num_seqs,
        max_model_len=2048,
        kv_memory_fraction=0.2,
        num_threads=num_threads,
    )
    return TideEngine.from_pretrained(workload.model, config)


def _answer(engine: TideEngine, workload: Workload) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(workload.chats(), workload.params())]


@torch.inference_mode()
def _hf_answers(
    loaded: LoadedModel, prompts: list[list[int]], max_tokens: int, batch_size: int, by_length: bool
) -> list[list[int]]:
    """HF ``generate`` in static, left-padded batches; an answer ends with its first EOS, padding is not counted."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if by_length else list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    model: Any = loaded.model
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        output = model.generate(
            ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=loaded.eos_token_ids[0] if loaded.eos_token_ids else 0,
        )
        for i, row in zip(batch, output[:, width:].tolist(), strict=True):
            ends = [n for n, token in enumerate(row) if token in loaded.eos_token_ids]
            answers[i] = row[: ends[0] + 1] if ends else row
    return answers


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Share of identical answers, and of tokens before the first difference. Rounding alone separates them in bf16."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    common = 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(a, b, strict=False))
        common += next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    total = sum(map(len, theirs))
    return {"identical_answers": round(same / len(theirs), 3), "tokens_before_difference": round(common / total, 3)}


def _ray_overhead(workload: Workload, max_num_seqs: int, num_threads: int, rounds: int) -> dict[str, Any]:
    """The job with one actor against the bare engine, interleaved, each with the machine to itself.

    Both rates are after start-up: tokens over the time from the first row's admission to the last row's end, as the
    job's ``run.json`` records it, and for the engine the time of ``generate``.
    """
    bare, job = [], []
    for _ in range(rounds):
        engine = _make_engine(workload, max_num_seqs, num_threads)
        engine.generate(workload.chats()[:4], SamplingParams(temperature=0, max_tokens=4))
        contender = Contender("bare engine", lambda engine=engine: _answer(engine, workload), [])  # type: ignore[misc]
        contender.measure()
        bare.append(contender.facts()["tokens_per_second"])
        del engine, contender
        job.append(_run_job(workload, max_num_seqs, num_threads))
    middle_bare, middle_job = statistics.median(bare), statistics.median(j["tokens_per_second"] for j in job)
    return {
        "bare_tokens_per_second": middle_bare,
        "job_tokens_per_second": middle_job,
        "bare_rounds": bare,
        "job_rounds": [j["tokens_per_second"] for j in job],
        "job_wall_seconds": statistics.median(j["wall_seconds"] for j in job),
        "overhead": round(1 - middle_job / middle_bare, 3),
    }


def _run_job(workload: Workload, max_num_seqs: int, num_threads: int) -> dict[str, Any]:
    from rich.console import Console

    from tide_ray.data.job import run_generate
    from tide_ray.data.job_config import GenerateJobConfig

    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in workload.texts), encoding="utf-8")
        settings = {
            "model": workload.model,
            "prompts": [str(prompts)],
            "output": str(Path(scratch) / "out"),
            "dtype": workload.dtype,
            "max_tokens": workload.max_tokens,
            "max_num_seqs": max_num_seqs,
            "max_model_len": 2048,
            "num_threads": num_threads,
        }
        code = run_generate(GenerateJobConfig.build(settings), Console(stderr=True, quiet=True))
        if code != 0:
            raise RuntimeError(f"the job ended with exit code {code}")
        facts: dict[str, Any] = json.loads((Path(scratch) / "out" / "run.json").read_text(encoding="utf-8"))
        return facts


def hardware() -> str:
    """The accelerator, or the CPU with its cores and the instructions that matter."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, flags = "CPU", ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    kinds = [kind for kind in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {kind} " in f"{flags} "]
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {kinds[0] if kinds else 'no vector extension'}"
