"""The Grafana dashboard asks for metrics that there are, and for all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tide_ray.data.metrics import JOB_TAG, METRICS

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana-dashboard.json").read_text(encoding="utf-8"))
RAYS_OWN_TAGS = {"WorkerId"}


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def metric_names(query: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|tide)\w*", query))


def test_every_query_names_a_metric_that_exists_and_every_metric_is_shown() -> None:
    exported = {metric.exported_name for metric in METRICS}
    named = [metric_names(query) for query in queries()]
    assert all(named), "a query without a metric"
    assert set().union(*named) == exported


def test_queries_group_by_tags_that_their_metric_has_and_keep_to_the_job() -> None:
    tags = {metric.exported_name: {JOB_TAG, metric.tag} | RAYS_OWN_TAGS for metric in METRICS}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            known = set.intersection(*(tags[name] for name in metric_names(target["expr"])))
            for group in re.findall(r"by \((\w+)\)", target["expr"]):
                assert group in known, target["expr"]
                assert f"{{{{{group}}}}}" in target["legendFormat"]
            assert target["expr"].count(f'{JOB_TAG}=~"$job"') == len(re.findall(r"ray_tide", target["expr"]))
            assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_lie_beside_and_below_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
