"""What a schema cannot say: the operator's own rules and ours, for one RayCluster spec."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
GPU = "nvidia.com/gpu"
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}
BEHIND_FEATURE_GATES = {"networkPolicy", "tlsOptions", "historyServerOptions", "managedBy"}


def problems(spec: Json, ray_version: str, raybooth_version: str, home: str) -> list[str]:
    """Every broken rule of a cluster spec, in words; empty when all hold."""
    found = [*_cluster(spec, ray_version), *_head(spec["headGroupSpec"])]
    for group in spec["workerGroupSpecs"]:
        found += _workers(group)
    for name, group in groups(spec):
        found += [f"{name}: {text}" for text in _group(group)]
        found += [f"{name}: {text}" for text in _image(group, ray_version, raybooth_version)]
        found += [f"{name}: {text}" for text in _environment(group, home)]
    return found


def groups(spec: Json) -> list[tuple[str, Json]]:
    """The head group and the worker groups, each with its name."""
    return [
        ("head", spec["headGroupSpec"]),
        *((group["groupName"], group) for group in spec["workerGroupSpecs"]),
    ]


def container(group: Json) -> Json:
    """The Ray container: the operator takes the first."""
    first: Json = group["template"]["spec"]["containers"][0]
    return first


def environment(group: Json) -> dict[str, str]:
    """The variables of the Ray container."""
    return {item["name"]: item.get("value", "") for item in container(group).get("env", [])}


def _cluster(spec: Json, ray_version: str) -> Iterator[str]:
    if spec.get("rayVersion") != ray_version:
        yield f"rayVersion is {spec.get('rayVersion')}, constraints.txt pins {ray_version}"
    auth = spec.get("authOptions", {})
    if auth.get("mode") != "token":
        yield "authOptions.mode is not token: the cluster would be open"
    if not auth.get("secretName"):
        yield "authOptions.secretName is not set: each new cluster would get another token"
    if not spec.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling is off: workers would never come"
    if spec.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version is not v2"
    for name in sorted(BEHIND_FEATURE_GATES & set(spec)):
        yield f"{name} is behind a feature gate of the operator"


def _head(head: Json) -> Iterator[str]:
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head: num-cpus is not "0": trainers would share the head'
    if GPU in container(head)["resources"]["limits"]:
        yield "head: asks for a GPU"


def _workers(group: Json) -> Iterator[str]:
    name = group["groupName"]
    if group.get("minReplicas") != 0 or group.get("replicas") != 0:
        yield f"{name}: does not start from zero"
    if not group.get("maxReplicas", 0) > 0:
        yield f"{name}: maxReplicas lets no worker come"
    resources = container(group)["resources"]
    if GPU not in resources.get("limits", {}):
        yield f"{name}: no {GPU} in limits, where Ray looks for it"
    tolerated = [item.get("key") for item in group["template"]["spec"].get("tolerations", [])]
    if GPU not in tolerated:
        yield f"{name}: does not tolerate the taint of GPU nodes"


def _group(group: Json) -> Iterator[str]:
    parameters = group.get("rayStartParams", {})
    if RESOURCE_PARAMETERS & set(parameters) and group.get("resources"):
        yield "resources are set in rayStartParams and beside it"
    if "labels" in parameters:
        yield "labels belong beside rayStartParams, not into it"
    for key, value in parameters.items():
        if not isinstance(value, str):
            yield f"rayStartParams.{key} is not text"
    template = group["template"]["spec"]
    if template.get("restartPolicy", "Never") != "Never":
        yield "restartPolicy is not Never, as autoscaler v2 needs"
    if not template.get("securityContext", {}).get("runAsNonRoot"):
        yield "may run as root"
    resources = container(group)["resources"]
    for name in ("cpu", "memory"):
        request, limit = (resources[kind].get(name) for kind in ("requests", "limits"))
        if request is None or limit is None or _quantity(request) > _quantity(limit):
            yield f"{name}: request {request} and limit {limit} do not agree"


def _image(group: Json, ray_version: str, raybooth_version: str) -> Iterator[str]:
    flavour = "gpu" if GPU in container(group)["resources"].get("limits", {}) else "cpu"
    wanted = f"{raybooth_version}-ray{ray_version}-{flavour}"
    image = container(group)["image"]
    if image.rpartition(":")[2] != wanted:
        yield f"image is {image}, its tag must be {wanted}"


def _environment(group: Json, home: str) -> Iterator[str]:
    variables = environment(group)
    if variables.get("RAY_AUTH_MODE") != "token":
        yield "RAY_AUTH_MODE is not token"
    if "RAY_enable_autoscaler_v2" in variables:
        yield "RAY_enable_autoscaler_v2 is set beside autoscalerOptions.version"
    if variables.get("RAYBOOTH_HOME") != home:
        yield f"RAYBOOTH_HOME is {variables.get('RAYBOOTH_HOME')}, the image's is {home}"
    mounted = {mount["mountPath"]: mount for mount in container(group).get("volumeMounts", [])}
    if home not in mounted:
        yield f"nothing is mounted at {home}"
        return
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    volume = volumes.get(mounted[home]["name"], {})
    if "persistentVolumeClaim" not in volume:
        yield f"what is mounted at {home} is not the shared volume"


def _quantity(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)(m|[KMGT]i|[kMGT])?", str(text))
    assert match, f"{text} is not a quantity"
    units = {None: 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
    return float(match[1]) * units[match[2]]
