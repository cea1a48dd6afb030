"""The operator's commands against a running platform: publish, roll out, run rounds, look."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from atoll.control_client import ControlClient, reach, retry_until
from atoll.output import columns, show
from atoll.settings import MODEL, MODEL_OF_CSV, ConfigurationError, DataFolder
from device_sim.payments import FEATURE_SET
from device_sim.payments_csv import CSV_FEATURE_SET
from fl_coordinator.rounds import ENDED, State
from model_delta.digest import digest_of
from model_delta.errors import Malformed, SignatureInvalid

PUBLISH_TIMEOUT_S = 300.0
BYTES = "application/octet-stream"
ROUND_MARGIN_S = 180.0
POLL_S = 0.5
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
    if threshold is not None:
        options["threshold"] = str(threshold)
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
        "Nobody runs it yet: atoll rollout apply FILE"
    )


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
    show(every, columns(every, ("name", "state", "stage", "in_stage", "adopted", "target")), as_json=as_json)


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


def run_round(
    data: Path,
    model: str,
    quorum: int,
    hostile: int,
    deadline_s: float,
    steps: int,
    *,
    wait: bool,
    contact_s: float,
    as_json: bool,
) -> None:
    """Open a round and, unless told otherwise, follow it to its end. Raises SystemExit(1) when it failed."""
    client = operator(data, contact_s)
    spec = {"model": model, "quorum": quorum, "hostile_max": hostile, "deadline_s": deadline_s, "steps": steps}
    opened = client.post("/v1/rounds", spec)
    patience_s = deadline_s + ROUND_MARGIN_S if wait else 0.0
    found = follow_round(client, opened["round_id"], patience_s, quiet=as_json or not wait)
    show(found, _round_text(found), as_json=as_json)
    if wait and found["state"] != "PUBLISHED":
        raise typer.Exit(1)


def follow_round(client: ControlClient, round_id: str, seconds: float, *, quiet: bool) -> dict[str, Any]:
    """The round once it has ended, or as it is after `seconds`; each change of state is told on standard error."""
    end, told = time.monotonic() + seconds, ""
    while True:
        found: dict[str, Any] = retry_until(end, lambda: client.get(f"/v1/rounds/{round_id}"))
        line = f"round {round_id}: {found['state'].lower()}, {len(found['admitted'])} contributions"
        if line != told and not quiet:
            typer.echo(line, err=True)
            told = line
        if State[found["state"]] in ENDED or time.monotonic() >= end:
            return found
        time.sleep(POLL_S)


def show_rounds(data: Path, round_id: str, *, contact_s: float, as_json: bool) -> None:
    """One round with everybody who was refused and why, or all of them."""
    client = operator(data, contact_s)
    if round_id:
        found = client.get(f"/v1/rounds/{round_id}")
        show(found, _round_text(found), as_json=as_json)
        return
    every = client.get("/v1/rounds")
    show(every, columns(every, ("round_id", "state", "admitted", "chosen", "rejected", "candidate")), as_json=as_json)


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
    lines = [
        f"rollout {found['name']}: {found['state']}, stage {found['stage'] + 1} of {_count(found['stages'])}",
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


def _round_text(found: dict[str, Any]) -> str:
    lines = [f"round {found['round_id']}: {found['state'].lower()}, {len(found['admitted'])} contributions"]
    if found["chosen"]:
        lines.append(f"chosen: {len(found['chosen'])} devices; their sum is all that was opened")
    lines += [f"  not used: {device}: {reason}" for device, reason in dict(found["rejected"]).items()]
    lines += [f"  refused at admission: {count} x {reason}" for reason, count in dict(found["refused"]).items()]
    if found["candidate"]:
        lines.append(f"candidate {found['candidate']}: published; roll it out with `target: latest`")
    if found["reason"]:
        lines.append(f"reason: {found['reason']}")
    return "\n".join(lines)
