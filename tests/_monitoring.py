"""What the Grafana dashboard and the Prometheus rules ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "sparse-prefill.json"
RULES = DEPLOY / "prometheus" / "sparse-prefill.rules.yml"
BY_PROMETHEUS = {"up", "ALERTS"}  # no server exports these
OF_TARGETS = {"job", "instance"}  # labels that Prometheus adds
FUNCTIONS = {"sum", "by", "rate", "increase", "count", "max", "min", "on", "and", "unless"}
FUNCTIONS |= {"histogram_quantile", "max_over_time", "label_values"}

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_TEXT = r'"(?:[^"\\]|\\.)*"'


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def queries() -> dict[str, str]:
    """Every expression of the dashboard and its variables, and of the rules, by what asks it."""
    board = dashboard()
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]["query"]
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return found


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Metrics of an expression, each with what is asked of its labels: "=value" or "" for more
    than an exact value."""
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", "", expression)
    bare = re.sub(r"label_values\((.*), \w+\)", r"\1", bare)
    found = []
    for match in re.finditer(rf"({_NAME})\s*(\{{[^}}]*\}})?", re.sub(r"\[[^]]*\]", "", bare)):
        name, labels = match.groups()
        if name in FUNCTIONS or bare[match.start() - 1 : match.start()].isdigit():
            continue
        pairs = re.findall(rf"({_NAME})\s*(=~|!=|!~|=)\s*({_TEXT})", labels or "")
        found.append(
            (name, {label: value.strip('"') if how == "=" else "" for label, how, value in pairs})
        )
    return found
