"""tide_ray: distributed batch inference on Ray with a depth and a time for every token.

The names below load on first use, so that ``import tide_ray`` imports neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tide_ray.startup import quick_imports

if TYPE_CHECKING:
    from tide_ray.config import EngineConfig
    from tide_ray.data.processor import TideProcessorConfig, build_processor
    from tide_ray.engine.engine import TideEngine
    from tide_ray.types import CompletionOutput, Logprob, RequestOutput, SamplingParams, UserError

__version__ = version("tide-ray")

__all__ = [
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "TideEngine",
    "TideProcessorConfig",
    "UserError",
    "__version__",
    "build_processor",
]

_MODULE_OF = {
    "CompletionOutput": "tide_ray.types",
    "EngineConfig": "tide_ray.config",
    "Logprob": "tide_ray.types",
    "RequestOutput": "tide_ray.types",
    "SamplingParams": "tide_ray.types",
    "TideEngine": "tide_ray.engine.engine",
    "TideProcessorConfig": "tide_ray.data.processor",
    "UserError": "tide_ray.types",
    "build_processor": "tide_ray.data.processor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quick_imports():
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
