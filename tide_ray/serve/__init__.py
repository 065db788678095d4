"""Serving with the names of ``ray.serve.llm``: ``LLMConfig`` and ``build_openai_app``.

The names load on first use, so that the command line stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tide_ray.serve.config import LLMConfig, LLMServingArgs, ModelLoadingConfig, ServerConfig
    from tide_ray.serve.deployment import build_openai_app

__all__ = ["LLMConfig", "LLMServingArgs", "ModelLoadingConfig", "ServerConfig", "build_openai_app"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "tide_ray.serve.deployment" if name == "build_openai_app" else "tide_ray.serve.config"
    value = globals()[name] = getattr(import_module(module), name)
    return value
