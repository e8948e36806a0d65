"""kustomization.yaml names every manifest and every image, and builds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

CLUSTER = Path(__file__).parents[2] / "cluster"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((CLUSTER / "kustomization.yaml").read_text())
RESOURCES = {
    name: yaml.safe_load((CLUSTER / name).read_text()) for name in KUSTOMIZATION["resources"]
}
COMPONENTS = {"storage", "cluster", "train", "serve"}


def _images(value: Any) -> set[str]:
    """Every `image:` below a value."""
    if isinstance(value, dict):
        here = {value["image"]} if isinstance(value.get("image"), str) else set()
        return here.union(*(_images(part) for part in value.values()))
    if isinstance(value, list):
        return set().union(*(_images(part) for part in value))
    return set()


def test_it_lists_every_manifest() -> None:
    beside = {path.name for path in CLUSTER.glob("*.yaml")} - {"kustomization.yaml"}
    generated = {name for item in KUSTOMIZATION["configMapGenerator"] for name in item["files"]}
    assert set(KUSTOMIZATION["resources"]) | generated == beside


def test_it_names_every_image() -> None:
    used = {image.rpartition(":")[0] for image in _images(RESOURCES)}
    assert used == {image["name"] for image in KUSTOMIZATION["images"]}


def test_each_object_carries_its_component() -> None:
    labels = [body["metadata"]["labels"] for body in RESOURCES.values()]
    labels += [item["options"]["labels"] for item in KUSTOMIZATION["configMapGenerator"]]
    assert {item["app.kubernetes.io/component"] for item in labels} == COMPONENTS
    assert {item["app.kubernetes.io/part-of"] for item in labels} == {"raybooth"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
def test_kubectl_builds_it_with_images_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    shutil.copytree(CLUSTER, folder)
    images = [{"name": "raybooth", "newName": "images.example/team/raybooth"}]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({**KUSTOMIZATION, "images": images}))
    built = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True
    )
    objects = list(yaml.safe_load_all(built.stdout))
    kinds = sorted(body["kind"] for body in objects)
    assert kinds == ["ConfigMap", "PersistentVolumeClaim", "RayCluster", "RayJob", "RayService"]
    renamed = {
        image.replace("raybooth:", f"{images[0]['newName']}:") for image in _images(RESOURCES)
    }
    assert _images(objects) == renamed
    fleet = next(body for body in objects if body["kind"] == "ConfigMap")
    assert fleet["data"] == {"fleet.yaml": (CLUSTER / "fleet.yaml").read_text()}
