"""The dashboard is one that Grafana reads, and draws what the engines really export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raybooth_serving.metrics import EngineMetrics
from raybooth_serving.scale.prometheus import AGAIN, AWAY, COUNTERS, DURATION, GAUGES, STEP_COUNTERS

ROOT = Path(__file__).parents[2]
BOARD: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]
OURS = {
    *(f"ray_raybooth_{name}_total" for name in (*COUNTERS, *STEP_COUNTERS, AGAIN, AWAY)),
    *(f"ray_raybooth_{name}" for name in GAUGES),
    f"ray_raybooth_{DURATION}_bucket",
}
"""As Ray 2.60 writes them: counters end in _total, histograms in _bucket."""

RAYS_OWN = {"ray_serve_num_http_requests_total"}


def _drawn() -> set[str]:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries += [each["definition"] for each in BOARD["templating"]["list"] if "definition" in each]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def test_every_query_names_a_metric_that_is_exported_and_every_metric_is_drawn() -> None:
    assert _drawn() == OURS | RAYS_OWN


def test_rays_own_metric_is_one_of_the_installed_ray() -> None:
    import ray.serve

    source = Path(ray.serve.__file__).with_name("_private") / "request_ingress_metrics.py"
    assert 'f"serve_num_{protocol_name}_requests"' in source.read_text()
    assert '"status_code"' in source.read_text()


def test_counters_are_fields_of_the_engine() -> None:
    fields = set(EngineMetrics().snapshot())
    assert set(COUNTERS) | set(STEP_COUNTERS) <= fields
    assert set(GAUGES) - {"subjects_per_step"} <= fields


def test_queries_use_labels_that_there_are() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            labels = set(re.findall(r"by \(([^)]*)\)", target["expr"]))
            named = {label.strip() for group in labels for label in group.split(",")}
            assert named <= {"base", "bucket", "size", "le", "status_code"}, panel["title"]
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= named | {"base", "replica"}, panel["title"]


def test_panels_are_whole_and_do_not_overlap() -> None:
    assert BOARD["schemaVersion"] >= 39
    assert [each["name"] for each in BOARD["templating"]["list"]] == ["datasource", "base"]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["type"] == "timeseries"
        assert panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(s == {"type": "prometheus", "uid": "${datasource}"} for s in sources)
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_brackets_of_each_query_close(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        for left, right in ("()", "{}", "[]"):
            assert target["expr"].count(left) == target["expr"].count(right)
