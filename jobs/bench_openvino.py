"""OpenVINO GenAI's continuous batching as a contender, on the GGUF file that the model comes from.

It keeps the file's quantised weights (4 bits for the demo model), where the others run what they were dequantised to.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tide_ray.types import UserError

PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
CACHE_GIB = 2


def is_installed() -> bool:
    """Whether the ``bench`` extra is there."""
    return find_spec("openvino_genai") is not None


class OpenVinoPipeline:
    """One loaded pipeline.

    Args:
        gguf: the model.
        dtype: what it computes in, by torch's name.
        max_num_seqs: most sequences that it will run at a time.

    Raises:
        UserError: OpenVINO cannot read the file.
    """

    def __init__(self, gguf: Path, *, dtype: str, max_num_seqs: int, num_threads: int) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = max_num_seqs
        scheduler.cache_size = CACHE_GIB
        scheduler.enable_prefix_caching = False  # every round asks the same prompts
        properties = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "INFERENCE_NUM_THREADS": num_threads}
        try:
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(gguf), scheduler, "CPU", properties)
        except RuntimeError as error:
            raise UserError(f"gguf: OpenVINO cannot read {str(gguf)!r}: {error}") from None

    def answers(
        self, prompts: list[list[int]], max_tokens: int, eos_token_ids: set[int], num_at_a_time: int
    ) -> list[list[int]]:
        """Greedy answers, EOS included, in the order of the prompts (token ids)."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.do_sample = False
        config.stop_token_ids = eos_token_ids
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))[::-1]
        running: dict[int, Any] = {}
        while waiting or running:
            while waiting and len(running) < num_at_a_time:  # the scheduler's own limit does not hold it back
                number = waiting.pop()
                ids = openvino.Tensor(np.array([prompts[number]], dtype=np.int64))
                running[number] = self._pipeline.add_request(number, ids, config)
            self._pipeline.step()
            for number, handle in list(running.items()):
                status = handle.get_status()
                if status not in (openvino_genai.GenerationStatus.RUNNING, openvino_genai.GenerationStatus.FINISHED):
                    raise RuntimeError(f"OpenVINO left prompt {number} unanswered: {status}")
                if status == openvino_genai.GenerationStatus.FINISHED:
                    answers[number] = list(handle.read_all()[0].generated_ids)
                    del running[number]
        return answers
