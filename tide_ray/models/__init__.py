"""Any causal language model: finding and loading it, and running it over packed rows."""

from tide_ray.models.load import LoadedModel, load

__all__ = ["LoadedModel", "load"]
