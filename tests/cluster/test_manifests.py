"""The manifests are valid, keep the operator's rules, and agree with code, configs and pins."""

from __future__ import annotations

import ast
import copy
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from raybooth import __version__
from raybooth.config import FleetConfig, ServeConfig, TrainConfig, find_config, parse_config
from raybooth.errors import ConfigError
from raybooth_serving.access.auth import open_keyring
from raybooth_serving.access.keys import Keyring
from tests.cluster import rules
from tests.cluster.schema import Json, mistakes

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
NAME_LIMITS = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
HOME = "/var/lib/raybooth"


def _documents() -> dict[str, Json]:
    paths = sorted(CLUSTER.glob("*.yaml"))
    every = {path.name: list(yaml.safe_load_all(path.read_text())) for path in paths}
    assert all(len(documents) == 1 for documents in every.values())
    return {name: documents[0] for name, documents in every.items()}


DOCUMENTS = _documents()
MANIFESTS = {name: body for name, body in DOCUMENTS.items() if body.get("kind") in RAY_KINDS}
BY_KIND = {body["kind"]: body for body in MANIFESTS.values()}


def _cluster_spec(manifest: Json) -> Json:
    spec = manifest["spec"]
    found: Json = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def _rule_breaks(spec: Json) -> list[str]:
    return rules.problems(spec, _pins()["ray"], __version__, HOME)


@pytest.fixture(scope="session")
def crds(shared_data: Path) -> Path:
    folder = shared_data / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip("../shared/data/kuberay-crds is not here")
    return folder


# ------------------------------------------------------------------ the operator's schemas


def test_each_kind_is_there_once() -> None:
    assert sorted(body["kind"] for body in MANIFESTS.values()) == sorted(RAY_KINDS)
    assert {body["apiVersion"] for body in MANIFESTS.values()} == {"ray.io/v1"}


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_manifest_passes_the_schema(name: str, crds: Path) -> None:
    assert mistakes(MANIFESTS[name], crds) == []


def _typo_at_the_top(manifest: Json) -> None:
    manifest["spec"]["rayVersoin"] = "2.60.0"


def _typo_in_a_worker_group(manifest: Json) -> None:
    group = _cluster_spec(manifest)["workerGroupSpecs"][0]
    group["minReplica"] = group.pop("minReplicas")


def _typo_in_a_container(manifest: Json) -> None:
    first = rules.container(_cluster_spec(manifest)["headGroupSpec"])
    first["volumeMount"] = first.pop("volumeMounts")


def _typo_in_metadata(manifest: Json) -> None:
    manifest["metadata"]["label"] = {}


def _number_where_text_belongs(manifest: Json) -> None:
    _cluster_spec(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _unknown_auth_mode(manifest: Json) -> None:
    _cluster_spec(manifest)["authOptions"]["mode"] = "tokens"


def _no_head(manifest: Json) -> None:
    del _cluster_spec(manifest)["headGroupSpec"]


@pytest.mark.parametrize("name", sorted(MANIFESTS))
@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_typo_at_the_top, "rayVersoin"),
        (_typo_in_a_worker_group, "minReplica"),
        (_typo_in_a_container, "volumeMount"),
        (_typo_in_metadata, "label"),
        (_number_where_text_belongs, "not of type 'string'"),
        (_unknown_auth_mode, "tokens"),
        (_no_head, "headGroupSpec"),
    ],
)
def test_schema_refuses(name: str, spoil: Callable[[Json], None], word: str, crds: Path) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    spoil(manifest)
    found = mistakes(manifest, crds)
    assert any(word in mistake for mistake in found), found


# ------------------------------------------------------------------ the rules beside the schemas


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_cluster_keeps_the_rules(name: str) -> None:
    assert _rule_breaks(_cluster_spec(MANIFESTS[name])) == []


def _head_of(spec: Json) -> Json:
    found: Json = spec["headGroupSpec"]
    return found


def _workers_of(spec: Json) -> Json:
    found: Json = spec["workerGroupSpecs"][0]
    return found


def _gpu_in_requests_only(spec: Json) -> None:
    resources = rules.container(_workers_of(spec))["resources"]
    resources["requests"][rules.GPU] = resources["limits"].pop(rules.GPU)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda spec: spec.update(rayVersion="2.59.0"), "constraints.txt pins"),
        (lambda spec: spec.pop("authOptions"), "would be open"),
        (lambda spec: spec["authOptions"].pop("secretName"), "another token"),
        (lambda spec: spec["autoscalerOptions"].update(version="v1"), "not v2"),
        (lambda spec: spec.update(networkPolicy={}), "feature gate"),
        (lambda spec: _head_of(spec)["rayStartParams"].pop("num-cpus"), "share the head"),
        (lambda spec: _head_of(spec).update(resources={"CPU": "0"}), "beside it"),
        (lambda spec: _workers_of(spec).update(minReplicas=1), "from zero"),
        (_gpu_in_requests_only, "no nvidia.com/gpu in limits"),
        (lambda spec: _workers_of(spec)["template"]["spec"].pop("tolerations"), "taint"),
        (
            lambda spec: _workers_of(spec)["template"]["spec"].update(restartPolicy="Always"),
            "restartPolicy",
        ),
        (
            lambda spec: rules.container(_head_of(spec)).update(image="raybooth:latest"),
            "its tag must be",
        ),
        (lambda spec: rules.container(_workers_of(spec)).update(env=[]), "RAY_AUTH_MODE"),
        (
            lambda spec: rules.container(_workers_of(spec)).update(volumeMounts=[]),
            "nothing is mounted",
        ),
    ],
)
def test_rules_catch(spoil: Callable[[Json], Any], word: str) -> None:
    spec = copy.deepcopy(_cluster_spec(BY_KIND["RayCluster"]))
    spoil(spec)
    found = _rule_breaks(spec)
    assert any(word in text for text in found), found


def test_names_are_short_dns_labels() -> None:
    for manifest in MANIFESTS.values():
        name = manifest["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
        assert len(name) <= NAME_LIMITS[manifest["kind"]]


def test_all_clusters_share_one_token_and_one_volume() -> None:
    specs = [_cluster_spec(manifest) for manifest in MANIFESTS.values()]
    assert len({spec["authOptions"]["secretName"] for spec in specs}) == 1
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for spec in specs
        for _, group in rules.groups(spec)
        for volume in group["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    claim = DOCUMENTS["storage.yaml"]
    assert claims == {claim["metadata"]["name"]}
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


# ------------------------------------------------------------------ the job


def test_job_runs_a_real_command() -> None:
    from raybooth.cli import build_parser

    words = shlex.split(BY_KIND["RayJob"]["spec"]["entrypoint"])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert words[0] in scripts
    build_parser().parse_args(words[1:])
    with pytest.raises(SystemExit):
        build_parser().parse_args([*words[1:], "--no-such-option"])


def _mounted_config_map(group: Json, path: str) -> tuple[str, str]:
    """The ConfigMap, and its key, that a path inside the Ray container comes from."""
    folder, _, key = path.rpartition("/")
    mounts = {item["mountPath"]: item["name"] for item in rules.container(group)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    return volumes[mounts[folder]]["configMap"]["name"], key


def test_job_trains_a_fleet_that_is_mounted_and_valid() -> None:
    spec = BY_KIND["RayJob"]["spec"]
    path = shlex.split(spec["entrypoint"])[2]
    config_map, key = _mounted_config_map(spec["rayClusterSpec"]["headGroupSpec"], path)
    generated = {
        item["name"]: item for item in DOCUMENTS["kustomization.yaml"]["configMapGenerator"]
    }
    assert key in generated[config_map]["files"]
    assert generated[config_map]["options"]["disableNameSuffixHash"] is True
    fleet = parse_config(FleetConfig, DOCUMENTS[key], key)
    for subject in fleet.subjects:
        images = [subject.images] if isinstance(subject.images, str) else subject.images
        assert all(image.startswith(f"{HOME}/") for image in images)
    assert isinstance(fleet.train, str)
    find_config("train", fleet.train)
    parse_config(TrainConfig, fleet.defaults.overrides, key)


def test_job_says_its_gpus_and_fits_a_worker() -> None:
    overrides = DOCUMENTS["fleet.yaml"]["defaults"]["overrides"]["resources"]
    group = _workers_of(_cluster_spec(BY_KIND["RayJob"]))
    limits = rules.container(group)["resources"]["limits"]
    assert 0 < overrides["num_gpus"] <= int(limits[rules.GPU])
    assert overrides["num_cpus"] <= int(limits["cpu"])


def test_job_cleans_up_after_itself() -> None:
    spec = BY_KIND["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert "clusterSelector" not in spec


# ------------------------------------------------------------------ the service


def _serve_config() -> Json:
    found: Json = yaml.safe_load(BY_KIND["RayService"]["spec"]["serveConfigV2"])
    return found


def _unknown_serve_keys(config: Json) -> list[str]:
    """Keys that Ray Serve would drop without a word: its schema ignores what it does not know."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    unknown = set(config) - set(ServeDeploySchema.model_fields)
    unknown |= set(config.get("http_options", {})) - set(HTTPOptionsSchema.model_fields)
    for application in config["applications"]:
        unknown |= set(application) - set(ServeApplicationSchema.model_fields)
    return sorted(unknown)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_config_is_what_ray_serve_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = _serve_config()
    ServeDeploySchema.model_validate(config)
    assert _unknown_serve_keys(config) == []
    config["applications"][0]["route_prefx"] = "/"
    config["http_options"]["hots"] = "0.0.0.0"
    assert _unknown_serve_keys(config) == ["hots", "route_prefx"]
    del config["applications"][0]["import_path"]
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate(config)


def test_service_imports_a_builder_that_exists() -> None:
    (application,) = _serve_config()["applications"]
    module, _, name = application["import_path"].partition(":")
    source = ROOT / "serving" / Path(*module.split(".")).with_suffix(".py")
    functions = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    arguments = functions[name].args
    assert len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults) == 1


def test_service_arguments_are_a_serve_config() -> None:
    (application,) = _serve_config()["applications"]
    arguments = application["args"]
    config = parse_config(ServeConfig, arguments, "args")
    limits = rules.container(_workers_of(_cluster_spec(BY_KIND["RayService"])))["resources"]
    pools = [*config.bases, *([config.full] if config.full else [])]
    most = [p.replicas if isinstance(p.replicas, int) else p.replicas.max for p in pools]
    groups = _cluster_spec(BY_KIND["RayService"])["workerGroupSpecs"]
    assert sum(most) <= sum(group["maxReplicas"] for group in groups)
    for served in pools:
        assert served.num_gpus is not None
        assert 0 < served.num_gpus <= int(limits["limits"][rules.GPU])
        assert served.num_cpus <= int(limits["limits"]["cpu"])
    assert not {"host", "port"} & set(arguments), "http_options decide, these would do nothing"


def test_service_port_is_the_one_the_operator_looks_for() -> None:
    options = _serve_config()["http_options"]
    assert options["host"] == "0.0.0.0"
    for name, group in rules.groups(_cluster_spec(BY_KIND["RayService"])):
        ports = {port["name"]: port["containerPort"] for port in rules.container(group)["ports"]}
        assert ports["serve"] == options["port"], name


def test_service_does_not_start_without_api_keys(tmp_path: Path) -> None:
    config = _serve_config()
    parsed = parse_config(ServeConfig, config["applications"][0]["args"], "args")
    host = config["http_options"]["host"]
    with pytest.raises(ConfigError, match="raybooth keys create"):
        open_keyring(parsed.auth, host, tmp_path)
    Keyring(tmp_path / "keys.json").create("ops")
    assert open_keyring(parsed.auth, host, tmp_path) is not None


# ------------------------------------------------------------------ the image


def test_image_installs_the_pinned_versions() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    for name, pin in (("RAY", _pins()["ray"]), ("TORCH", _pins()["torch"])):
        assert set(re.findall(rf"ARG {name}_VERSION=(\S+)", text)) == {pin}
    installs = re.findall(r"pip install[^&\n]*", text)
    assert installs
    assert all("--constraint constraints.txt" in install for install in installs)


def test_image_has_both_targets_and_what_the_probes_call() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE))
    assert {"cpu", "gpu"} <= set(stages.values())
    assert re.search(r"apt-get install .*\bbash\b.*\bwget\b", text)
    assert set(re.findall(r"RAYBOOTH_HOME=(\S+)", text)) == {HOME}
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"
    tags = re.findall(r"-t raybooth:(\S+)", text)
    assert tags == [f"{__version__}-ray{_pins()['ray']}-{flavour}" for flavour in ("cpu", "gpu")]


def test_image_user_owns_the_volume() -> None:
    users = set(re.findall(r"^USER (\d+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE))
    contexts = [
        group["template"]["spec"]["securityContext"]
        for manifest in MANIFESTS.values()
        for _, group in rules.groups(_cluster_spec(manifest))
    ]
    assert users == {str(context["runAsUser"]) for context in contexts}
    assert all(context["fsGroup"] == context["runAsUser"] for context in contexts)


def test_build_context_holds_what_the_wheel_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {package.split("/")[0] for package in wheel["packages"]}
    needed |= {source.split("/")[0] for source in wheel["force-include"]}
    needed |= {build["project"]["readme"], *build["project"]["license-files"]}
    assert needed | {"pyproject.toml", "constraints.txt"} == kept
    assert all((ROOT / name).exists() for name in kept)
