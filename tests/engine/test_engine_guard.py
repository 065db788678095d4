"""What an actor does when its engine fails: a smaller engine, or the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tide_ray.config import EngineConfig
from tide_ray.data.engine_guard import GuardedEngine, is_out_of_memory, is_sticky
from tide_ray.engine.engine import TideEngine
from tide_ray.types import RequestOutput, SamplingParams

CONFIG = EngineConfig(
    dtype="float32", device="cpu", max_num_seqs=8, max_model_len=64, max_num_batched_tokens=64, selfcheck=False
)
PROMPTS = [f"prompt {i}" for i in range(12)]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def guarded(folder: Path, most_residents: int, changes: list[int]) -> GuardedEngine:
    """Engines whose third step or later fails like an allocation where more than ``most_residents`` are in."""

    def make(config: EngineConfig) -> TideEngine:
        engine = TideEngine.from_pretrained(str(folder), config)
        run = engine.runner.run

        def run_within_memory(*args: Any) -> Any:
            if len(engine.scheduler.residents) > most_residents and engine.stats.num_steps > 2:
                # A real allocation of this size fails, with the message that torch gives.
                torch.empty(1 << 46, dtype=torch.uint8)
            return run(*args)

        engine.runner.run = run_within_memory  # type: ignore[method-assign]
        return engine

    def failed() -> None:
        changes.append(0)

    return GuardedEngine(
        make, CONFIG, step_timeout=60, engine_failed=failed, engine_changed=lambda e: changes.append(e.max_num_seqs)
    )


def answers(guard: GuardedEngine) -> list[RequestOutput]:
    async def main() -> list[RequestOutput]:
        return list(await asyncio.gather(*(guard.generate(prompt, PARAMS) for prompt in PROMPTS)))

    return asyncio.run(main())


def test_out_of_memory_halves_the_residents_until_every_request_is_answered(
    tiny_llama_folder: Path,
) -> None:
    changes: list[int] = []
    outputs = answers(guarded(tiny_llama_folder, 2, changes))
    assert changes == [0, 4, 0, 2]
    expected = TideEngine.from_pretrained(str(tiny_llama_folder), CONFIG).generate(PROMPTS, PARAMS)
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in expected]


def test_out_of_memory_with_one_resident_is_an_error(tiny_llama_folder: Path) -> None:
    changes: list[int] = []
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        answers(guarded(tiny_llama_folder, 0, changes))
    assert changes == [0, 4, 0, 2, 0, 1]


DYING = """
import asyncio, sys, time
import torch
from tide_ray.config import EngineConfig
from tide_ray.data.engine_guard import GuardedEngine
from tide_ray.engine.engine import TideEngine
from tide_ray.types import SamplingParams

def make(config):
    engine = TideEngine.from_pretrained(sys.argv[1], config)
    def fail(*_):
        {failure}
    engine.runner.run = fail
    return engine

config = EngineConfig(dtype="float32", device="cpu", max_num_seqs=2, max_model_len=64, selfcheck=False)
guard = GuardedEngine(make, config, step_timeout=1.0, engine_failed=print, engine_changed=print)
asyncio.run(guard.generate("x", SamplingParams(max_tokens=2)))
"""


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("time.sleep(600)", "a step has not ended in 1 s"),
        ("raise torch.AcceleratorError('CUDA error: an illegal memory access was encountered')", "fatal device error"),
    ],
)
def test_a_hung_step_and_a_lost_device_end_the_process(tiny_llama_folder: Path, failure: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING.format(failure=failure), str(tiny_llama_folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


class CudaAPIError(Exception):
    """Numba's class of this name can only be imported beside a driver."""


@pytest.mark.parametrize(
    ("error", "memory", "sticky"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False, True),
        (CudaAPIError("[700] Call to cuMemcpyDtoH results in CUDA_ERROR_ILLEGAL_ADDRESS"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("out of memory of names"), False, False),
    ],
)
def test_errors_are_told_apart(error: Exception, memory: bool, sticky: bool) -> None:
    assert (is_out_of_memory(error), is_sticky(error)) == (memory, sticky)
