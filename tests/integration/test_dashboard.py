"""The Grafana dashboard asks for series that this server has."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.api import Api, run_job

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "stillhouse.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SERIES = re.compile(r"\b(?:stillhouse|process)_\w+")
LABEL = re.compile(r"by \(([\w, ]+)\)|\{\{(\w+)\}\}|\{(\w+)=")


def test_every_series_and_label_is_there(api: Api) -> None:
    run_job(api.make_job())
    text = api.client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    labels = {sample.name: set(sample.labels) for sample in samples}
    asked = {name for query in QUERIES for name in SERIES.findall(query)}
    assert asked <= labels.keys()
    assert len(asked) >= 8
    for query in QUERIES:
        (name, *_) = SERIES.findall(query)
        groups = [group for found in LABEL.findall(query) for group in found if group]
        wanted = {label.strip() for group in groups for label in group.split(",")}
        assert wanted <= labels[name], query


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
