"""The operator's commands against a running platform: publish, roll out, look. `rounds` has those about rounds."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.control_client import ControlClient, reach
from atoll.output import columns, show
from atoll.settings import MODEL, MODEL_OF_CSV, ConfigurationError, DataFolder
from device_sim.payments_csv import CSV_FEATURE_SET
from device_sim.terminal_features import FEATURE_SET
from model_delta.digest import digest_of
from model_delta.errors import Malformed, SignatureInvalid

PUBLISH_TIMEOUT_S = 300.0
BYTES = "application/octet-stream"
FEATURE_SET_OF = {MODEL: FEATURE_SET, MODEL_OF_CSV: CSV_FEATURE_SET}
FILE_BYTES_MAX = 4 << 30
"""Larger files are not even read; what the platform takes is less, and its own refusal says how much."""


def operator(data: Path, contact_s: float) -> ControlClient:
    """A client with the operator's token. Raises ConfigurationError without a platform in `data`, Unavailable when its
    coordinator does not answer within `contact_s`."""
    folder = DataFolder.open(data)
    client = ControlClient(folder.endpoints().coordinator, folder.tokens()["admin"])
    reach(contact_s, lambda: client.get("/v1/health", timeout_s=max(1.0, contact_s)))
    return client


def publish_model(
    data: Path,
    model: Path,
    name: str,
    label: str,
    threshold: float | None,
    feature_set: str,
    *,
    latency_ms_max: float | None = None,
    quantize: str = "",
    signature: Path | None = None,
    signer_key: Path | None = None,
    signer_chain: Sequence[Path] = (),
    signed_folder: Path | None = None,
    contact_s: float,
    as_json: bool,
) -> None:
    """Hand an ONNX file to the coordinator and show the version that it became.

    Models of the names that we know take the features that such devices compute, unless told otherwise. A `signature`
    (an OpenSSF model-signing bundle) is checked before anything is sent, and stays beside the version.
    """
    if signature is None and (signer_key is not None or signer_chain or signed_folder is not None):
        raise ConfigurationError("--signer-key, --signer-chain, --signed-folder: expected --signature BUNDLE too")
    if feature_set not in ("", *FEATURE_SET_OF.values()):
        raise ConfigurationError(
            f"--feature-set: expected {' or '.join(FEATURE_SET_OF.values())}, found {feature_set!r}; or leave it out"
        )
    source = read_file(model)
    bundle = b""
    if signature is not None:
        bundle = _checked_signature(model, source, signature, signer_key, signer_chain, signed_folder)
    options = {"model": name, "name": label, "feature_set": feature_set or FEATURE_SET_OF.get(name, "")}
    if quantize not in ("", "auto", "int8", "none"):
        raise ConfigurationError(f"--quantize: expected auto, int8 or none, found {quantize!r}; or leave it out")
    options["quantize"] = quantize
    if threshold is not None:
        options["threshold"] = str(threshold)
    if latency_ms_max is not None:
        options["latency_ms_max"] = str(latency_ms_max)
    client = operator(data, contact_s)
    if bundle:
        options["provenance"] = digest_of(bundle)
        client.request("PUT", f"/v1/store/artifact/{options['provenance']}", bundle, BYTES, PUBLISH_TIMEOUT_S, {})
    try:
        found = client.post(
            "/v1/models", source, timeout_s=PUBLISH_TIMEOUT_S, **{k: v for k, v in options.items() if v}
        )
    except Malformed as error:
        raise Malformed(f"{model}: {error}") from None
    show(found, _release_text(found), as_json=as_json)


def _checked_signature(
    model: Path, source: bytes, signature: Path, key: Path | None, chain: Sequence[Path], folder: Path | None
) -> bytes:
    """The bundle's bytes, if they vouch for `source`. Raises ConfigurationError: nothing is published then."""
    from fl_coordinator.provenance import verified_bundle  # its library comes with the extra `provenance`

    try:
        return verified_bundle(model, source, signature, key=key, chain=chain, folder=folder)
    except (SignatureInvalid, Malformed) as error:
        raise ConfigurationError(f"{error}; nothing was published") from None


def join_releases(data: Path, name: str, label: str, *, contact_s: float, as_json: bool) -> None:
    """Publish the version that joins all that were released apart. Raises Malformed when there is nothing to join."""
    client = operator(data, contact_s)
    found = client.post("/v1/releases/join", {"model": name, "name": label}, timeout_s=PUBLISH_TIMEOUT_S)
    show(found, _release_text(found), as_json=as_json)


def _release_text(found: dict[str, Any]) -> str:
    patches = ", ".join(f"{size} B from {base[:12]}" for base, size in found["bytes_patch"].items()) or "none"
    return (
        f"published {found['model']} {found['version']} as release {found['release']}\n"
        f"manifest  {found['manifest']}\nwhole     {found['bytes_whole']} B\npatches   {patches}\n"
        f"{_form_text(found)}{_latency_text(found)}Nobody runs it yet: atoll rollout apply FILE"
    )


def _latency_text(found: dict[str, Any]) -> str:
    most = found.get("latency_ms_max")
    return f"latency   devices go back from it if answers take more than {most:g} ms (--latency-max)\n" if most else ""


def _form_text(found: dict[str, Any]) -> str:
    form = found.get("form")
    if not form:
        return ""
    text = f"form      {'int8' if form['int8'] else 'float32'}: {form['reason']}\n"
    for name, choice in form["classes"].items():
        text += f"          {name or 'other'} ({choice['devices']} devices): {choice['reason']}\n"
    if form["fresh_because"]:
        text += f"          quantized afresh: {'; '.join(form['fresh_because'])}\n"
    if form.get("untried"):
        text += f"golden    none: {form['untried']}; devices judge it by their own answers\n"
    return text


def apply_rollout(data: Path, file: Path, *, contact_s: float, as_json: bool) -> None:
    """Begin the rollout of a YAML file."""
    text = read_text(file)
    found = operator(data, contact_s).post("/v1/rollouts", text, file=file.name)
    show(found, _rollout_text(found), as_json=as_json)


def show_rollouts(data: Path, name: str, *, contact_s: float, as_json: bool) -> None:
    """One rollout with its guardrails and history, or all of them."""
    client = operator(data, contact_s)
    if name:
        found = client.get(f"/v1/rollouts/{name}")
        show(found, _rollout_text(found), as_json=as_json)
        return
    every = client.get("/v1/rollouts")
    show(
        every, columns(every, ("name", "model", "standing", "stage", "in_stage", "adopted", "target")), as_json=as_json
    )


def abort_rollout(data: Path, name: str, *, contact_s: float, as_json: bool) -> None:
    """Send every device back to the stable version."""
    found = operator(data, contact_s).post(f"/v1/rollouts/{name}/abort", {"reason": "aborted by an operator"})
    show(found, _rollout_text(found), as_json=as_json)


def revoke_identity(data: Path, name: str, *, contact_s: float, as_json: bool) -> None:
    """End the certificate of a device or gateway."""
    operator(data, contact_s).post(f"/v1/identities/{urllib.parse.quote(name, safe='')}/revoke")
    show(
        {"revoked": name},
        f"{name}: its certificate was revoked; it gets no more keys and counts no more",
        as_json=as_json,
    )


def read_file(path: Path) -> bytes:
    """The bytes of a file that a person named. Raises ConfigurationError."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigurationError(
                f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {path.stat().st_size}; pass a smaller file"
            )
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: expected a readable file, found: {error.strerror}; check the path") from None


def read_text(path: Path) -> str:
    """The text of a file that a person named. Raises ConfigurationError."""
    data = read_file(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"{path}:{line}: expected text in UTF-8, found byte {data[error.start]:#04x}; save the file as UTF-8"
        ) from None


def _rollout_text(found: dict[str, Any]) -> str:
    standing = found.get("standing") or found["state"]
    lines = [
        f"rollout {found['name']}: {standing}, stage {found['stage'] + 1} of {_count(found['stages'])}",
        f"target {found['target'][:12]}, stable {found['stable'][:12]}, plan serial {found['serial']}",
    ]
    if found.get("in_stage"):
        lines.append(f"{found['adopted']} of {found['in_stage']} devices in the stage run the target")
    if found.get("reason"):
        lines.append(f"reason: {found['reason']}")
    lines += [f"  {'BREACHED ' if one['breached'] else ''}{one['text']}" for one in found.get("guardrails", [])]
    lines += [f"  {event['event']}: {event['reason']}" for event in found.get("history", [])]
    return "\n".join(lines)


def _count(stages: Any) -> int:
    return stages if isinstance(stages, int) else len(stages)
