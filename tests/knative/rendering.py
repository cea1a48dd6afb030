"""The part of kustomize that this repository uses: resources, a namespace, and JSON patches (RFC 6902) with a target.

Anything else in a kustomization is refused, so that a file cannot say more than the tests have seen. Where kubectl is
installed a test compares this with `kubectl kustomize`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_KEYS = {"apiVersion", "kind", "resources", "namespace", "patches"}


def render(directory: Path) -> list[dict[str, Any]]:
    """The objects of the kustomization in `directory`. Raises ValueError for what is not understood."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - _KEYS
    if unknown or kustomization["kind"] != "Kustomization":
        raise ValueError(f"{directory}: expected a Kustomization of {sorted(_KEYS)}, found {sorted(unknown)}")
    objects: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = directory / name
        objects += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        targets = [item for item in objects if _matches(item, patch["target"])]
        if len(targets) != 1 or patch.keys() != {"target", "patch"}:
            raise ValueError(f"{directory}: expected a JSON patch with one target, found {len(targets)}")
        for operation in yaml.safe_load(patch["patch"]):
            _apply(targets[0], operation)
    if "namespace" in kustomization:
        for item in objects:
            item["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def _matches(item: dict[str, Any], target: dict[str, str]) -> bool:
    group, _, version = item["apiVersion"].rpartition("/")
    found = {"group": group, "version": version, "kind": item["kind"], "name": item["metadata"]["name"]}
    return all(found[key] == value for key, value in target.items())


def _apply(document: Any, operation: dict[str, Any]) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        document = document[int(part)] if isinstance(document, list) else document[part]
    key: Any = int(last) if isinstance(document, list) else last
    match operation["op"]:
        case "test" if document[key] == operation["value"]:
            pass
        case "replace" if isinstance(document, list) or key in document:
            document[key] = operation["value"]
        case "add" if isinstance(document, dict):
            document[key] = operation["value"]
        case op:
            raise ValueError(f"patch: {op} {operation['path']} does not apply")
