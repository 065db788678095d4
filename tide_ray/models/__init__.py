"""Any causal language model: finding and loading it, and running it over packed rows.

The names below load on first use: a job's driver looks for a model and runs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tide_ray.models.loading import LoadedModel, load

__all__ = ["LoadedModel", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tide_ray.models import loading

    return getattr(loading, name)
