"""The gateway's Knative Service: rendered per region, checked against Knative's own schema and rules.

`service_schema.json` is the structure that Knative publishes (its source is named inside). The API server prunes fields
that a structural schema does not know, so a misspelt field would be silently without effect: here it fails. The rules
for autoscaling annotations are those of knative/serving `pkg/apis/autoscaling/annotation_validation.go`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests.knative.rendering import render

ROOT = Path(__file__).parents[2] / "knative"
REGIONS = ("eu-west", "ap-south")
PREFIX = "autoscaling.knative.dev/"
WINDOW_SECONDS = (6, 3_600)


def structural(schema: Any) -> Any:
    """The schema with unknown fields refused wherever the custom resource's schema is structural."""
    if isinstance(schema, list):
        return [structural(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: structural(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    return strict


def faults(service: dict[str, Any]) -> list[str]:
    """What Knative would refuse, prune or misread in `service`."""
    schema = structural(json.loads((Path(__file__).parent / "service_schema.json").read_text()))
    found = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(service)]
    if found:
        return found
    if (service["apiVersion"], service["kind"]) != ("serving.knative.dev/v1", "Service"):
        found.append(f"expected serving.knative.dev/v1 Service, found {service['apiVersion']} {service['kind']}")
    template = service["spec"]["template"]
    found += annotation_faults(template["metadata"].get("annotations", {}))
    if any(key.startswith(PREFIX) for key in service["metadata"].get("annotations", {})):
        found.append("autoscaling annotations belong on the template; on the Service they are ignored")
    containers = template["spec"]["containers"]
    ports = [port for container in containers for port in container.get("ports", [])]
    if len(ports) != 1 or ports[0].get("name", "") not in ("", "http1", "h2c", "user-port"):
        found.append(f"expected one port named http1, h2c or not at all, found {ports}")
    if not 0 <= template["spec"].get("containerConcurrency", 0) <= 1_000:
        found.append("containerConcurrency: expected 0 to 1000")
    volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
    mounts = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
    if volumes != mounts:
        found.append(f"expected every volume mounted and every mount a volume, found {volumes ^ mounts}")
    for container in containers:
        for probe in ("readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if port not in (ports[0]["containerPort"], ports[0].get("name")):
                found.append(f"{probe}: expected the container's port, found {port}")
    return found


def annotation_faults(annotations: dict[str, str]) -> list[str]:
    """What `ValidateAnnotations` of knative/serving refuses, and keys that it does not know."""
    values = {key.removeprefix(PREFIX): value for key, value in annotations.items() if key.startswith(PREFIX)}
    rules: dict[str, Callable[[str], bool]] = {
        "class": lambda text: text in ("kpa.autoscaling.knative.dev", "hpa.autoscaling.knative.dev"),
        "metric": lambda text: text in ("concurrency", "rps"),
        "min-scale": whole_number,
        "max-scale": whole_number,
        "initial-scale": whole_number,
        "target": lambda text: number(text) >= 0.01,
        "target-utilization-percentage": lambda text: 1 <= number(text) <= 100,
        "target-burst-capacity": lambda text: number(text) >= 0 or number(text) == -1,
        "panic-window-percentage": lambda text: 1 <= number(text) <= 100,
        "panic-threshold-percentage": lambda text: 110 <= number(text) <= 1_000,
        "window": lambda text: WINDOW_SECONDS[0] <= seconds(text) <= WINDOW_SECONDS[1],
        "scale-down-delay": lambda text: 0 <= seconds(text) <= WINDOW_SECONDS[1],
        "scale-to-zero-pod-retention-period": lambda text: 0 <= seconds(text) <= WINDOW_SECONDS[1],
    }
    found = [f"{PREFIX}{key}: {value!r}" for key, value in values.items() if key not in rules or not rules[key](value)]
    least, most = (values.get(key, "0") for key in ("min-scale", "max-scale"))
    if not found and 0 < int(most) < int(least):
        found.append(f"max-scale={most} is less than min-scale={least}")
    return found


def whole_number(text: str) -> bool:
    return text.isdigit() and int(text) < 2**31


def number(text: str) -> float:
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else float("nan")


def seconds(text: str) -> float:
    """A Go duration of whole hours, minutes and seconds; NaN for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or match is None:
        return float("nan")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    return hours * 3_600 + minutes * 60 + rest


def service(region: str = REGIONS[0]) -> dict[str, Any]:
    (rendered,) = render(ROOT / "overlays" / region)
    return rendered


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("region", REGIONS)
def test_each_region_renders_to_a_service_that_knative_takes(region: str) -> None:
    manifest = service(region)
    assert faults(manifest) == []
    assert manifest["metadata"]["namespace"] == f"atoll-{region}"
    environment = {entry["name"]: entry["value"] for entry in container(manifest)["env"]}
    assert environment["ATOLL_REGION"] == region
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_every_overlay_is_a_region_under_test() -> None:
    assert {path.name for path in (ROOT / "overlays").iterdir()} == set(REGIONS)


def test_it_scales_to_zero_and_is_bounded() -> None:
    annotations = service()["spec"]["template"]["metadata"]["annotations"]
    assert annotations[f"{PREFIX}min-scale"] == "0"
    assert 1 <= int(annotations[f"{PREFIX}max-scale"]) <= 100
    concurrency = service()["spec"]["template"]["spec"]["containerConcurrency"]
    assert float(annotations[f"{PREFIX}target"]) <= concurrency


def test_images_name_no_registry() -> None:
    image = container(service())["image"]
    assert "/" not in image
    assert not image.endswith(":latest")


def test_probes_are_routes_of_the_gateway() -> None:
    probes = {container(service())[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")}
    assert probes == {"/v2/health/ready", "/healthz"}
    assert "startupProbe" not in container(service())


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = manifest
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part.replace("|", "/")]
        place[last.replace("|", "/")] = value

    return change


SPEC = "spec/template/spec"
ANNOTATIONS = "spec/template/metadata/annotations/autoscaling.knative.dev|"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(f"{SPEC}/replicas", 3), "'replicas' was unexpected"),
        (_set(f"{SPEC}/containers/0/readinesProbe", {}), "'readinesProbe' was unexpected"),
        (_set(f"{SPEC}/containers/0/readinessProbe/httpGet/pth", "/"), "'pth' was unexpected"),
        (_set(f"{SPEC}/containerConcurrency", "256"), "not of type 'integer'"),
        (_set(f"{SPEC}/containers/0/env/0/value", 1), "not of type 'string'"),
        (_set(f"{SPEC}/containers/0/resources/limits/memory", "512 MB"), "does not match"),
        (_set(f"{SPEC}/containers", None), "not of type 'array'"),
        (_set("spec/replicas", 3), "'replicas' was unexpected"),
        (_set("kind", "Deployment"), "expected serving.knative.dev/v1 Service"),
        (_set(f"{SPEC}/containers/0/readinessProbe/httpGet/port", 8081), "expected the container's port"),
        (_set(f"{SPEC}/containers/0/ports/0/name", "http"), "expected one port named"),
        (_set(f"{SPEC}/volumes", []), "every mount a volume"),
        (_set("metadata/annotations", {f"{PREFIX}min-scale": "0"}), "belong on the template"),
        (_set(f"{ANNOTATIONS}min-scale", 0), "not of type 'string'"),
        (_set(f"{ANNOTATIONS}min-scale", "-1"), "min-scale: '-1'"),
        (_set(f"{ANNOTATIONS}min-scale", "21"), "max-scale=20 is less than min-scale=21"),
        (_set(f"{ANNOTATIONS}minscale", "0"), "minscale"),
        (_set(f"{ANNOTATIONS}target", "0"), "target: '0'"),
        (_set(f"{ANNOTATIONS}metric", "cpu"), "metric: 'cpu'"),
        (_set(f"{ANNOTATIONS}window", "5s"), "window: '5s'"),
        (_set(f"{ANNOTATIONS}window", "60"), "window: '60'"),
        (_set(f"{ANNOTATIONS}scale-down-delay", "2h"), "scale-down-delay: '2h'"),
        (_set(f"{ANNOTATIONS}class", "kpa"), "class: 'kpa'"),
    ],
)
def test_a_broken_manifest_is_found(change: Callable[[dict[str, Any]], None], message: str) -> None:
    broken = copy.deepcopy(service())
    change(broken)
    assert any(message in fault for fault in faults(broken)), faults(broken)


def test_a_patch_that_no_longer_fits_the_base_is_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "knative")
    base = tmp_path / "knative" / "base" / "service.yaml"
    base.write_text(base.read_text().replace("- name: ATOLL_REGION", "- name: OTHER"))
    with pytest.raises(ValueError, match="test /spec/template/spec/containers/0/env/0/name does not apply"):
        render(tmp_path / "knative" / "overlays" / REGIONS[0])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("region", REGIONS)
def test_kubectl_renders_the_same(region: str, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = ["kubectl", "kustomize", str(ROOT / "overlays" / region)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment)
    assert list(yaml.safe_load_all(done.stdout)) == render(ROOT / "overlays" / region)
