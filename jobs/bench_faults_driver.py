"""A generation job whose engine can be made to fail by what a prompt says; see ``bench_faults``.

``python jobs/bench_faults_driver.py JOB.yaml``: the engine is the real one, but a prompt with the word POISON kills the
process like the kernel's out-of-memory killer, HANG lets no step return, and by environment variables more residents
than allowed ask for more memory than there is, and no step takes less time than said. Ray's workers get the class by
value, so this file must be the program that runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
import typer
from bench_fault_runs import HANG, MOST_RESIDENTS, POISON, STEP_SECONDS

from tide_ray.cli.errors import errors_as_exit_codes
from tide_ray.config import EngineConfig
from tide_ray.data.actor import Generator
from tide_ray.data.job import run_generate
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.types import Prompt, SamplingParams

# The driver's variables: workers have their node's.
most_residents = int(os.environ.get(MOST_RESIDENTS, "1000000"))
step_seconds = float(os.environ.get(STEP_SECONDS, "0"))


class FaultyEngine(TideEngine):
    """Fails where it is told to."""

    hangs = False

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
        start = time.monotonic()
        results = super().step()
        time.sleep(max(0.0, step_seconds - (time.monotonic() - start)))
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
