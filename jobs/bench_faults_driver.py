"""A generation job whose engine can be made to fail by what a prompt says; see ``bench_faults``.

``python jobs/bench_faults_driver.py JOB.yaml``: the engine is the real one, but a prompt with the word POISON kills the
process like the kernel's out-of-memory killer, and HANG lets no step return. By environment variables more residents
than allowed ask for more memory than there is, and engines wait for a file once they have answered so many rows: a
fast model's job was over before the fault that should strike it. Ray's workers get the class by value, so this file
must be the program that runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
import typer
from bench_fault_runs import GATE, HANG, HOLD_AFTER, MOST_RESIDENTS, POISON

from tide_ray.cli.errors import errors_as_exit_codes
from tide_ray.config import EngineConfig
from tide_ray.data.actor import Generator
from tide_ray.data.job import run_generate
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.types import Prompt, SamplingParams

# The driver's variables: workers have their node's.
most_residents = int(os.environ.get(MOST_RESIDENTS, "1000000"))
gate = os.environ.get(GATE, "/")  # which is there
hold_after = int(os.environ.get(HOLD_AFTER, "1000000"))


class FaultyEngine(TideEngine):
    """Fails where it is told to."""

    hangs = False
    num_answered = 0

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams, **options: Any) -> None:
        text = str(prompt)
        if POISON in text:
            os.kill(os.getpid(), signal.SIGKILL)
        self.hangs = self.hangs or HANG in text
        super().add_request(request_id, prompt, params, **options)

    def step(self) -> list[Any]:
        while self.hangs:
            time.sleep(1)
        if len(self.scheduler.residents) > most_residents:
            torch.empty(1 << 46, dtype=torch.uint8)  # fails as a real allocation does
        while self.num_answered >= hold_after and not os.path.exists(gate):
            time.sleep(0.01)
        results = super().step()
        self.num_answered += len(results)
        return results


class FaultyGenerator(Generator):
    def _make_engine(self, model: str, config: EngineConfig) -> TideEngine:
        engine = FaultyEngine.from_pretrained(model, config)
        engine.warm_up()
        return engine


if __name__ == "__main__":
    try:
        with errors_as_exit_codes():
            sys.exit(run_generate(GenerateJobConfig.from_yaml(sys.argv[1]), generator=FaultyGenerator))
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
