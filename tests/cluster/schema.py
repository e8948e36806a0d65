"""The API server's view of a manifest: KubeRay's own schema, unknown fields refused, offline."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

Json = dict[str, Any]
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": TEXTS,
        "annotations": TEXTS,
    },
}


def mistakes(manifest: Json, crds: Path) -> list[str]:
    """What the API server would refuse or silently drop, each with its place; empty when valid."""
    schema = _load(crds / f"ray.io_{PLURALS[manifest['kind']]}.yaml", manifest["apiVersion"])
    filled = with_defaults(copy.deepcopy(manifest), schema)
    found = Draft7Validator(strict(schema)).iter_errors(filled)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


def with_defaults(value: Any, schema: Json) -> Any:
    """`value` with the schema's defaults filled in, as the API server does before it validates."""
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                value[name] = with_defaults(value[name], part)
        rest = schema.get("additionalProperties")
        if isinstance(rest, dict):
            value = {k: with_defaults(v, rest) for k, v in value.items()}
    elif isinstance(value, list) and "items" in schema:
        value = [with_defaults(item, schema["items"]) for item in value]
    return value


def strict(schema: Json) -> Json:
    """A structural schema as a JSON schema that refuses every field that would be pruned."""
    result = {key: part for key, part in schema.items() if not key.startswith("x-kubernetes")}
    result.pop("default", None)
    if "properties" in schema:
        result["properties"] = {k: strict(part) for k, part in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = schema.get("additionalProperties", False)
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if result.pop("nullable", False) and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


@cache
def _load(path: Path, api_version: str) -> Json:
    definition = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    group = definition["spec"]["group"]
    served = {f"{group}/{version['name']}": version for version in definition["spec"]["versions"]}
    schema: Json = served[api_version]["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = METADATA
    schema["properties"]["apiVersion"] = {"const": api_version}
    schema["properties"]["kind"] = {"const": definition["spec"]["names"]["kind"]}
    return schema
