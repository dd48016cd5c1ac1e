"""The dashboard and the alerts as files; that what they ask for is exported: test_live_page.py."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from _monitoring import DEPLOY, RULES, dashboard, queries, selectors

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: prometheus)")


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_selectors_are_found() -> None:
    expression = (
        'sum by (job) (rate(a:b_total{kind="x", job=~"$job"}[5m])) / (sum(c{}) > 0) '
        "and on (job) max by (job) (max_over_time(d[1d])) > 1.5 * up == 1"
    )
    assert selectors(expression) == [
        ("a:b_total", {"kind": "x", "job": ""}), ("c", {}), ("d", {}), ("up", {}),
    ]  # fmt: skip


def test_the_dashboard_is_one_that_grafana_can_provision() -> None:
    board = dashboard()
    assert board["id"] is None and board["uid"] and board["title"] and "vllm" in board["tags"]
    panels: list[dict[str, Any]] = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            # Every query can be narrowed to some servers.
            asked = [set(labels) for _, labels in selectors(target["expr"])]
            assert asked and all({"job", "instance"} <= labels for labels in asked)
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "job", "instance"}


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.glob("grafana/provisioning/*/*.yaml")), ids=lambda p: p.name
)
def test_provisioning_parses(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content["apiVersion"] == 1
    assert content.get("datasources") or content.get("providers")


def test_the_rules_say_what_to_do() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    guide = (DEPLOY.parent / "docs" / "operating.md").read_text()
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        assert f"`{rule['alert']}`" in guide, f"{rule['alert']} is not in docs/operating.md"


@needs_promtool
def test_every_expression_is_promql(tmp_path: Path) -> None:
    promtool("check", "rules", str(RULES))
    rules = [
        {
            "record": f"r{n}",
            "expr": text.replace("$__rate_interval", "5m").replace("$__range", "1h"),
        }
        for n, (who, text) in enumerate(queries().items())
        if not who.startswith("variable")
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", str(file))


@needs_promtool
def test_alerts_fire_when_they_shall() -> None:
    promtool("test", "rules", str(Path(__file__).parent / "promtool" / "sparse-prefill.test.yml"))
