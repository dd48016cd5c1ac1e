"""What the files of deploy/ start: every `vllm serve` in them, however it is written there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
FILES = sorted(p for p in DEPLOY.rglob("*") if p.suffix in (".yaml", ".yml", ".json"))
# What LeaderWorkerSet's webhook puts into the environment of every container.
OF_A_GROUP = {"LWS_LEADER_ADDRESS": "leader", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
OPTIONS = {  # of the chart's vllmConfig, and what its template makes of them
    "maxModelLen": "--max-model-len",
    "tensorParallelSize": "--tensor-parallel-size",
    "dtype": "--dtype",
    "maxNumSeqs": "--max-num-seqs",
}


@dataclass(frozen=True)
class Server:
    """One `vllm serve`."""

    where: str
    line: list[str]  # what follows `vllm serve`
    environment: dict[str, str] = field(default_factory=dict)
    mounts: dict[str, str] = field(default_factory=dict)  # path in the container: what lies there


def documents(path: Path) -> list[Any]:
    """All of a file."""
    return [d for d in yaml.safe_load_all(path.read_text()) if d is not None]


def kind_of(document: Any) -> str:
    """What a document is, by its own words. Raises ValueError for what nobody checks."""
    keys = {
        "services": "compose",
        "scrape_configs": "prometheus",
        "groups": "rules",
        "servingEngineSpec": "chart",
        "applications": "ray",
        "nameReference": "references",
        "panels": "dashboard",
        "providers": "provisioning",
        "datasources": "provisioning",
    }
    for key, kind in keys.items():
        if key in document:
            return kind
    if document.get("format") == "vllm-sparse-profile":
        return "profile"
    if {"apiVersion", "kind"} <= document.keys():
        return "kubernetes"
    raise ValueError(f"a document of an unknown kind, with {sorted(document)}")


def of_kind(kind: str) -> list[tuple[Path, Any]]:
    """Files and documents."""
    return [(path, d) for path in FILES for d in documents(path) if kind_of(d) == kind]


def servers() -> Iterator[Server]:
    """All there are."""
    for path, document in of_kind("compose"):
        yield from _of_compose(path, interpolated(document))
    for path, document in of_kind("kubernetes"):
        for name, pod in pods(document):
            yield from _of_pod(f"{_short(path)} {name}", pod)
    for path, document in of_kind("chart"):
        for model in document["servingEngineSpec"]["modelSpec"]:
            yield _of_chart(f"{_short(path)} {model['name']}", model)
    for path, document in of_kind("ray"):
        for application in document["applications"]:
            for model in application["args"]["llm_configs"]:
                yield _of_ray(_short(path), model)


def interpolated(value: Any) -> Any:
    """A Compose file with its variables' defaults."""
    if isinstance(value, dict):
        return {key: interpolated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item) for item in value]
    if isinstance(value, str):
        filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        if "$" in filled:
            raise ValueError(f"a variable without a default: {value}")
        return filled
    return value


def entry_point(target: str | None) -> list[str]:
    """ENTRYPOINT of a stage of the Dockerfile; None: of its last."""
    found: dict[str | None, list[str]] = {}
    stage: str | None = None
    for line in (REPOSITORY / "Dockerfile").read_text().splitlines():
        if match := re.fullmatch(r"FROM \S+(?: AS (\S+))?", line):
            stage = match[1]
        elif line.startswith("ENTRYPOINT "):
            found[stage] = json.loads(line.removeprefix("ENTRYPOINT "))
    return found[target]


def pods(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Pod specifications anywhere in a document, and where."""
    if isinstance(value, dict):
        if "containers" in value:
            yield name, value
        for key, item in value.items():
            yield from pods(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from pods(item, name)


def pod_of_chart(engine: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The parts of a pod that the chart takes as they are."""
    resources = {"cpu": str(model["requestCPU"]), "memory": model["requestMemory"]}
    return {
        "securityContext": engine["securityContext"],
        "volumes": model["extraVolumes"],
        "containers": [
            {
                "name": "vllm",
                "image": f"{model['repository']}:{model['tag']}",
                "securityContext": engine["containerSecurityContext"],
                "env": model["env"],
                "resources": {"requests": resources},
                "volumeMounts": model["extraVolumeMounts"],
            }
        ],
    }


def images(value: Any) -> Iterator[str]:
    """Every image that a document names."""
    if isinstance(value, dict):
        if isinstance(image := value.get("image"), str):
            yield image
        if {"repository", "tag"} <= value.keys():
            yield f"{value['repository']}:{value['tag']}"
        for item in value.values():
            yield from images(item)
    elif isinstance(value, list):
        for item in value:
            yield from images(item)


def _short(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def _of_compose(path: Path, document: Any) -> Iterator[Server]:
    for name, service in document["services"].items():
        if "build" not in service:  # somebody else's image
            continue
        whole = [*entry_point(service["build"].get("target")), *service["command"]]
        mounts = {}
        for volume in service["volumes"]:
            source, target = (
                volume.split(":")[:2]
                if isinstance(volume, str)
                else (volume["source"], volume["target"])
            )
            mounts[target] = source
        environment = {k: v for k, v in service["environment"].items() if v is not None}
        yield Server(f"{_short(path)} {name}", _after_serve(whole), environment, mounts)


def _of_pod(where: str, pod: dict[str, Any]) -> Iterator[Server]:
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        environment = {
            variable["name"]: variable.get("value", "") for variable in container.get("env", [])
        }
        if "VLLM_ADDITIONAL_ARGS" in environment:  # KServe's command line, through a shell
            line = ["/mnt/models", *shlex.split(environment["VLLM_ADDITIONAL_ARGS"])]
        else:
            line = _after_serve([*container["command"], *container.get("args", [])])
        mounts = {
            mount["mountPath"]: json.dumps(volumes[mount["name"]])
            for mount in container.get("volumeMounts", [])
        }
        line = [_filled(word, {**OF_A_GROUP, **environment}) for word in line]
        yield Server(f"{where} {container['name']}", line, environment, mounts)


def _of_chart(where: str, model: dict[str, Any]) -> Server:
    options = model["vllmConfig"]
    line = [model["modelURL"], "--host", "0.0.0.0", "--port", "8000"]
    line += [
        "--enable-prefix-caching"
        if options["enablePrefixCaching"]
        else "--no-enable-prefix-caching"
    ]
    for name, option in OPTIONS.items():
        line += [option, str(options[name])] if name in options else []
    if unknown := options.keys() - OPTIONS.keys() - {"enablePrefixCaching", "extraArgs"}:
        raise ValueError(f"{where}: vllmConfig: nobody knows here what becomes of {unknown}")
    volumes = {volume["name"]: json.dumps(volume) for volume in model["extraVolumes"]}
    return Server(
        where,
        line + options["extraArgs"],
        {variable["name"]: variable.get("value", "") for variable in model["env"]},
        {m["mountPath"]: volumes[m["name"]] for m in model["extraVolumeMounts"]},
    )


def _of_ray(where: str, model: dict[str, Any]) -> Server:
    line = [model["model_loading_config"]["model_source"]]
    for name, value in model["engine_kwargs"].items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        line += [f"--{name.replace('_', '-')}", text]
    return Server(where, line, model.get("runtime_env", {}).get("env_vars", {}))


def _filled(word: str, known: dict[str, str]) -> str:
    """A word of a container's command, in which $(NAME) is a variable."""
    return re.sub(r"\$\((\w+)\)", lambda match: known[match[1]], word)


def _after_serve(words: list[str]) -> list[str]:
    if words[:2] != ["vllm", "serve"]:
        raise ValueError(f"want `vllm serve ...`, got {words[:2]}")
    return words[2:]
