"""Analyses of what jobs leave: SQL views over their Parquet, and reports made from them.

``load("out").pandas("SELECT depth, count(*) AS tokens FROM tokens GROUP BY depth")``
"""

from tide_ray.analytics.dataset import Analytics, load

__all__ = ["Analytics", "load"]
