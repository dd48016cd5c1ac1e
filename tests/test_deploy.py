"""The files of deploy/, as far as parsers and schemas can tell; nothing of them is started here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from _command_line import read_serve, unknown_variables
from _deploy import (
    DEPLOY,
    FILES,
    REPOSITORY,
    Server,
    documents,
    images,
    interpolated,
    kind_of,
    of_kind,
    pod_of_chart,
    pods,
    servers,
)

from vllm_sparse_backend.profile import load_profile

COMPOSE = DEPLOY / "compose" / "compose.yaml"
OVERLAYS = [path.parent for path, _ in of_kind("kubernetes") if path.name == "kustomization.yaml"]
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="no kubectl, which carries kustomize")
# Objects whose schemas belong to others: what of them is a pod is checked as one.
OF_OTHERS = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),
    ("serving.kserve.io/v1alpha2", "LLMInferenceService"),
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"),
}


def ran(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_pod(specification: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"},
        "spec": specification,
    }


def valid(document: Any) -> None:
    """By Kubernetes' own schema, in which every key must be known."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def compose() -> dict[str, Any]:
    document: dict[str, Any] = interpolated(documents(COMPOSE)[0])
    return document


every_server = pytest.mark.parametrize("server", list(servers()), ids=lambda server: server.where)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_is_of_a_kind_that_is_checked(path: Path) -> None:
    assert documents(path)
    for document in documents(path):
        kind_of(document)


def test_yamllint() -> None:
    ran(sys.executable, "-m", "yamllint", "--strict", str(DEPLOY))


def test_every_way_to_deploy_starts_a_server() -> None:
    named = {server.where.split("/")[0] for server in servers()}
    folders = {path.name for path in DEPLOY.iterdir()} - {"grafana", "prometheus"}
    assert named == folders
    assert {path.parent.name for path in FILES} >= folders


@every_server
def test_vllm_reads_the_command_line(server: Server) -> None:
    served = read_serve(server.line, server.environment)
    assert served.sparse
    assert served.arguments.model_tag  # and no option has eaten it
    assert served.config.profile is not None


@pytest.mark.parametrize(
    "line",
    [
        ["m", "--attention-bakend", "sparse_prefill"],
        ["m", "--attention-backend", "sparse_prefil"],
        ["m", "--attention-back", "sparse_prefill"],
        ["m", "--max-num-seqs", "many"],
        ["m", "--additional-config", '{"sparse_prefill": {"profil": "p"}}'],
        ["m", "--kv-transfer-config", '{"kv_connector": "N", "kv_role": "prefill"}'],
    ],
    ids=lambda line: line[1],
)
def test_what_is_misspelt_would_be_seen(line: list[str]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        read_serve(line)


@every_server
def test_variables_are_known(server: Server) -> None:
    assert unknown_variables(server.environment) == []
    assert unknown_variables({"VLLM_CPU_KVCACHE": "4", "VLLM_SPARSE_PREFILL_PROFIL": "p"})


@every_server
def test_the_profile_is_mounted_where_the_server_looks(server: Server) -> None:
    if server.where.startswith("ray"):
        pytest.skip("Ray mounts nothing: the nodes have the file, as serve.yaml says")
    profile = read_serve(server.line, server.environment).config.profile
    assert profile is not None
    what = server.mounts.get(profile) or server.mounts[str(Path(profile).parent)]
    assert "profile" in what


@pytest.mark.parametrize(
    ("path", "document"),
    of_kind("profile"),
    ids=lambda x: x.parent.name if isinstance(x, Path) else "",
)
def test_profiles_are_profiles(path: Path, document: Any) -> None:
    assert load_profile(path).name == document["name"]


def test_images_have_tags() -> None:
    named = {image for path in FILES for d in documents(path) for image in images(d)}
    assert len(named) >= 5
    for image in named:
        match = re.fullmatch(r"[\w.\-/]+:(\w[\w.\-]*)", image)
        assert match and match[1] != "latest", image


@pytest.mark.parametrize(
    ("path", "document"),
    of_kind("kubernetes"),
    ids=lambda x: f"{x.parent.name}/{x.name}" if isinstance(x, Path) else "",
)
def test_objects_are_valid(path: Path, document: Any) -> None:
    kind = document["apiVersion"], document["kind"]
    if kind not in OF_OTHERS:
        valid(document)
        return
    assert document["kind"] == "Kustomization" or document["metadata"]["name"]
    assert list(pods(document)) or document["kind"] == "Kustomization", path
    for _, pod in pods(document):
        valid(as_pod(pod))


def test_a_wrong_key_of_a_pod_would_be_seen() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(as_pod({"containers": [{"name": "c", "volumeMount": []}]}))


@pytest.mark.parametrize(
    ("path", "document"), of_kind("chart"), ids=lambda x: getattr(x, "name", "")
)
def test_what_the_chart_puts_into_pods_is_valid(path: Path, document: Any) -> None:
    engine = document["servingEngineSpec"]
    for model in engine["modelSpec"]:
        valid(as_pod(pod_of_chart(engine, model)))
    assert engine["securityContext"]["runAsNonRoot"]


def pods_of_manifests() -> list[Any]:
    return [
        pytest.param(pod, id=f"{path.parent.name} {name}")
        for path, document in of_kind("kubernetes")
        for name, pod in pods(document)
    ]


@pytest.mark.parametrize("pod", pods_of_manifests())
def test_volumes_are_defined_and_used(pod: dict[str, Any]) -> None:
    defined = [volume["name"] for volume in pod.get("volumes", [])]
    used = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
    assert len(set(defined)) == len(defined)
    assert used == set(defined)
    for container in pod["containers"]:
        assert {"requests", "limits"} <= container["resources"].keys()
        assert "memory" in container["resources"]["limits"]
        for mount in container["volumeMounts"]:
            assert mount["name"] != "sparse-profile" or mount["readOnly"]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_another_profile_makes_other_pods(overlay: Path, tmp_path: Path) -> None:
    copy = tmp_path / overlay.name
    shutil.copytree(overlay, copy)
    names = []
    for tau in "0.002", "0.003":
        text = (copy / "profile.json").read_text()
        (copy / "profile.json").write_text(re.sub(r'"tau": [\d.]+', f'"tau": {tau}', text))
        built = list(yaml.safe_load_all(ran(str(KUBECTL), "kustomize", str(copy))))
        (config,) = (d for d in built if d["kind"] == "ConfigMap")
        assert list(config["data"]) == ["profile.json"] and config["immutable"]
        name = config["metadata"]["name"]
        assert re.fullmatch(r"sparse-profile-\w{10}", name)
        mounted = {
            volume["configMap"]["name"]
            for d in built
            for _, pod in pods(d)
            for volume in pod["volumes"]
            if "configMap" in volume
        }
        assert mounted == {name}
        for document in built:
            if (document["apiVersion"], document["kind"]) not in OF_OTHERS:
                valid(document)
        names.append(name)
    assert names[0] != names[1]


def test_prefill_and_decode_run_the_same_backend_and_profile() -> None:
    """NIXL's handshake compares the backend's name, and both salt requests alike."""
    roles = [s for s in servers() if s.where.startswith("kserve")]
    read = [read_serve(server.line, server.environment) for server in roles]
    assert {r.arguments.kv_transfer_config.kv_role for r in read} == {
        "kv_consumer",
        "kv_producer",
    }
    assert len({r.config for r in read}) == 1


def test_the_ranks_of_a_group_are_configured_alike() -> None:
    leader, worker = (s for s in servers() if s.where.startswith("leaderworkerset"))
    ours = [read_serve(server.line, server.environment) for server in (leader, worker)]
    apart = {"headless", "host", "port", "node_rank"}
    first, second = (
        {k: v for k, v in vars(read.arguments).items() if k not in apart} for read in ours
    )
    assert first == second
    assert [r.arguments.node_rank for r in ours] == [0, 1]
    assert [r.arguments.headless for r in ours] == [False, True]
    (group,) = (d for _, d in of_kind("kubernetes") if d["kind"] == "LeaderWorkerSet")
    assert first["nnodes"] == group["spec"]["leaderWorkerTemplate"]["size"]


def test_the_service_finds_the_leader() -> None:
    found = {d["kind"]: d for _, d in of_kind("kubernetes")}
    service, group = found["Service"], found["LeaderWorkerSet"]
    selector = dict(service["spec"]["selector"])
    assert selector.pop("leaderworkerset.sigs.k8s.io/name") == group["metadata"]["name"]
    leader = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    assert selector == leader["metadata"]["labels"]
    ports = {p["name"] for c in leader["spec"]["containers"] for p in c["ports"]}
    assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports


def test_compose_is_valid() -> None:
    command = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    ran(*command, str(COMPOSE))


def test_compose_has_what_it_takes() -> None:
    document = compose()
    for name, service in document["services"].items():
        assert service["profiles"] and service["user"] not in ("0", "root"), name
        assert service["cap_drop"] == ["ALL"]
        assert service["deploy"]["resources"]["limits"]["memory"]
        # Not for the world: nobody asks for a password.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for volume in service["volumes"]:
            if isinstance(volume, dict):
                assert volume["read_only"] and not volume["bind"]["create_host_path"]
                source = volume["source"]
            else:
                source, *_, options = volume.split(":")
            if source.startswith("."):
                assert (COMPOSE.parent / source).exists(), source
                assert isinstance(volume, dict) or options == "ro", volume
            else:
                assert source in document["volumes"], source
    for name in "server-cpu", "server-cuda":
        service = document["services"][name]
        assert "http://127.0.0.1:8000/health" in service["healthcheck"]["test"][-1]
        assert service["shm_size"]
        folder = COMPOSE.parent / service["build"]["context"]
        assert folder.resolve() == REPOSITORY
    cpu = document["services"]["server-cpu"]
    assert cpu["cpuset"] == cpu["environment"]["VLLM_CPU_OMP_THREADS_BIND"]
    assert cpu["environment"]["THP_MEM_ALLOC_ENABLE"] == "1"


def test_prometheus_asks_the_server_by_its_alias() -> None:
    (_, config), *_ = of_kind("prometheus")
    services = compose()["services"]
    aliases = [s["networks"]["default"]["aliases"] for s in services.values() if "build" in s]
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"{name}:8000" for name in aliases[0]]
    assert aliases[0] == aliases[1]
    mounted = [v.split(":")[1] for v in services["prometheus"]["volumes"]]
    (pattern,) = config["rule_files"]
    assert any(Path(path).match(pattern) for path in mounted)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: prometheus)")
def test_prometheus_reads_its_configuration() -> None:
    ran("promtool", "check", "config", "--syntax-only", str(COMPOSE.parent / "prometheus.yml"))


def test_what_lies_in_volumes_belongs_to_the_user_of_the_image() -> None:
    """A volume begins as what the image has at its place: root's, where that is nothing."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    made = "install --directory --owner=1000 --group=1000 /home/vllm/.cache"
    assert dockerfile.count(made) == dockerfile.count("ENTRYPOINT") == 2
    assert dockerfile.count("\nUSER 1000\n") == 2
