"""The operator's commands about federated rounds: run one, look at it, and replay its transcript.

`verify` asks no program of the platform: it reads a transcript that `show --transcript` has exported, and the trust
anchors, which may have come another way.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer

from atoll.control_client import ControlClient, retry_until
from atoll.operate import operator, read_file, read_text
from atoll.output import columns, show
from atoll.platform import COORDINATOR, read_anchors
from atoll.settings import MODEL, ConfigurationError, DataFolder, write_private
from fl_coordinator.round_yaml import read_round
from fl_coordinator.rounds import ENDED, RoundSpec, State
from fl_coordinator.rules.reveals import DISTANCES, GRAPH, SELECTION
from model_delta.encoding import unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.graphs.training import step_of
from model_delta.trust.updater import TrustAnchors

ROUND_MARGIN_S = 180.0
POLL_S = 0.5
ABORT_S = 15.0
_OPENED = {
    DISTANCES: "their sum, and the distances of all that were measured",
    GRAPH: "their sum, and which pairs are close",
    SELECTION: "their sum, and who they are",
}
_REVEALED = {
    DISTANCES: "distances",
    GRAPH: "graph: one bit a pair; norms, distances and scores are not revealed",
    SELECTION: "selection: who is chosen; norms, distances and scores are not revealed",
}
TRANSCRIPT_TIMEOUT_S = 120.0
DEFAULTS: Mapping[str, Any] = {"model": MODEL, "quorum": 12, "hostile": 2, "deadline": 60.0, "steps": 40}
_FIELD_OF = {"model": "model", "quorum": "quorum", "hostile": "hostile_max", "deadline": "deadline_s", "steps": "steps"}


def run_round(
    data: Path, file: Path | None, options: Mapping[str, Any], *, wait: bool, contact_s: float, as_json: bool
) -> None:
    """Open a round and, unless told otherwise, follow it to its end. Raises typer.Exit(1) when it failed.

    `options` are those of the command line by name, None where they were not given; a `file` has them all.
    """
    spec = _spec_of(file, {name: value for name, value in options.items() if value is not None})
    client = operator(data, contact_s)
    try:
        opened = client.post("/v1/rounds", spec)
    except Malformed as error:
        raise Malformed(f"{file}: {error}" if file else str(error)) from None
    patience_s = spec.get("deadline_s", RoundSpec(model="").deadline_s) + ROUND_MARGIN_S if wait else 0.0
    found = follow_round(client, opened["round_id"], patience_s, quiet=as_json or not wait)
    show(found, _round_text(found), as_json=as_json)
    if wait and found["state"] != "PUBLISHED":
        raise typer.Exit(1)


def _spec_of(file: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    if file is None:
        chosen = {**DEFAULTS, **given}
        return {field: chosen[name] for name, field in _FIELD_OF.items()}
    if given:
        name = next(iter(given))
        raise ConfigurationError(
            f"--{name}: expected it in {file}, found both; say it in the file, or leave the file out"
        )
    spec, rollout, graph = read_round(read_text(file), str(file))
    if graph:
        spec = msgspec.structs.replace(spec, graph=_graph(file.parent / graph))
    if rollout:
        spec = msgspec.structs.replace(spec, rollout=read_text(file.parent / rollout))
    before = RoundSpec(model="")
    values = {name: getattr(spec, name) for name in RoundSpec.__struct_fields__}
    return {
        name: msgspec.to_builtins(value)
        for name, value in values.items()
        if name == "model" or value != getattr(before, name)
    }


def _graph(path: Path) -> str:
    """A training graph, looked at before it is sent. Raises Malformed."""
    graph = read_file(path)
    step_of(graph, str(path))
    return base64.b64encode(graph).decode()


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


def list_rounds(data: Path, *, contact_s: float, as_json: bool) -> None:
    """A line for each round."""
    every = operator(data, contact_s).get("/v1/rounds")
    show(every, columns(every, ("round_id", "state", "admitted", "chosen", "rejected", "candidate")), as_json=as_json)


def show_status(data: Path, round_id: str, *, contact_s: float, as_json: bool) -> None:
    """One round, or a line for each."""
    if not round_id:
        list_rounds(data, contact_s=contact_s, as_json=as_json)
        return
    found = operator(data, contact_s).get(f"/v1/rounds/{round_id}")
    show(found, _round_text(found), as_json=as_json)


def show_round(data: Path, round_id: str, transcript: Path | None, *, contact_s: float, as_json: bool) -> None:
    """All that is known of one round; its transcript into a file. Raises NotFound for a round that opened nothing."""
    client = operator(data, contact_s)
    found = client.get(f"/v1/rounds/{round_id}")
    if transcript is not None:
        content = client.get_bytes(f"/v1/rounds/{round_id}/transcript", timeout_s=TRANSCRIPT_TIMEOUT_S)
        write_private(transcript, content)
        found = {**found, "transcript": str(transcript), "transcript_bytes": len(content)}
    show(found, _round_text(found, whole=True), as_json=as_json)


def abort_round(data: Path, round_id: str, *, contact_s: float, as_json: bool) -> None:
    """End a round, and show what became of it. Raises NotFound, and Malformed for one that has ended before."""
    client = operator(data, contact_s)
    before = client.post(f"/v1/rounds/{round_id}/abort", {})
    if State[before["state"]] in ENDED:
        raise Malformed(f"round {round_id}: has ended before, it is {before['state']}")
    found = follow_round(client, round_id, ABORT_S, quiet=True)
    show(found, _round_text(found), as_json=as_json)


def verify_rounds(data: Path, files: Sequence[Path], anchors: Path | None, *, as_json: bool) -> None:
    """Replay transcripts from files. Raises Untrusted, after the report, when one does not hold."""
    from fl_coordinator.replay import replay_chain

    told_all = replay_chain([read_file(file) for file in files], _anchors(data, anchors))
    found = list(zip(files, told_all, strict=True))
    answers = [{"file": str(file), "holds": told.holds, **msgspec.to_builtins(told)} for file, told in found]
    show(answers, "\n".join(_replay_text(file, told) for file, told in found), as_json=as_json)
    wrong = [(file, check) for file, told in found for check in told.checks if check.problem]
    if wrong:
        file, check = wrong[0]
        raise Untrusted(f"{file}: {check.name}: {check.problem}")


def _anchors(data: Path, anchors: Path | None) -> TrustAnchors:
    if anchors is None:
        return read_anchors(DataFolder.open(data).identity(COORDINATOR))
    try:
        return unpack(read_file(anchors), TrustAnchors)
    except Malformed as error:
        raise ConfigurationError(
            f"{anchors}: expected trust anchors: {error}; take an identity's anchors.cbor"
        ) from None


def _replay_text(file: Path, told: Any) -> str:
    lines = [f"{file}: round {told.round_id or 'unknown'}: {'holds' if told.holds else 'DOES NOT HOLD'}"]
    lines += [f"  {check.name:<12} {check.problem or 'holds'}" for check in told.checks]
    if told.chosen or told.refused:
        lines.append(f"  chosen by {told.policy}: {len(told.chosen)} devices, refused: {len(told.refused)}")
    lines += [f"    {device}: {reason}" for device, reason in told.refused.items()]
    if told.on_trust:
        lines.append(f"  only the three signatures say {told.on_trust}")
    if told.delta:
        lines.append(_privacy_text(told.epsilon_release, told.epsilon_device, told.delta))
    return "\n".join(lines)


def _privacy_text(release: float, device: float, delta: float) -> str:
    return (
        f"  epsilon {release:.3g} of the releases, {device:.3g} of the most burdened device, at delta {delta:g}; it "
        "covers the opened sums, not what else was opened nor who was chosen"
    )


def _round_text(found: dict[str, Any], *, whole: bool = False) -> str:
    lines = [f"round {found['round_id']}: {found['state'].lower()}, {len(found['admitted'])} contributions"]
    if found["chosen"]:
        lines.append(f"chosen: {len(found['chosen'])} devices; opened: {_OPENED[found.get('reveal', DISTANCES)]}")
    lines += [f"  not used: {device}: {reason}" for device, reason in dict(found["rejected"]).items()]
    lines += [f"  refused at admission: {count} x {reason}" for reason, count in dict(found["refused"]).items()]
    lines += [f"  sat out: {count} x {reason}" for reason, count in dict(found.get("sat_out", {})).items()]
    spent = found.get("figures", {}).get("privacy")
    if spent:
        lines.append(_privacy_text(spent["epsilon_release"], spent["epsilon_device"], spent["delta"]))
    if found["candidate"]:
        lines.append(f"candidate {found['candidate']}: published; roll it out with `target: latest`")
    if found.get("figures", {}).get("autopilot"):
        lines.append(f"autopilot: {found['figures']['autopilot']}")
    if found["reason"]:
        lines.append(f"reason: {found['reason']}")
    if whole:
        lines += _details(found)
    return "\n".join(lines)


def _relayed(told: dict[str, Any]) -> str:
    if "failure" in told:
        return f"did not say that it announced it: {told['failure']}; {told['contributions']} contributed"
    reached = f" to {told['devices']} devices" if told["devices"] >= 0 else ""
    return f"announced after {told['announced_s']:.1f} s{reached}, {told['contributions']} contributed"


def _details(found: dict[str, Any]) -> list[str]:
    lines = [
        f"base      {found['base']}",
        f"root      {found['root'] or 'not frozen'}",
        f"policy    {found.get('policy', '')}, reveals {_REVEALED[found.get('reveal', DISTANCES)]}",
        f"attempts  {found['attempt']}",
    ]
    lines += [f"  relay of {name}: {_relayed(told)}" for name, told in found["figures"].get("relays", {}).items()]
    if found.get("transcript_digest"):
        lines.append(f"transcript {found['transcript_digest']}")
    evidence = found["figures"].get("evidence", {})
    lines += [f"  signed by {device}, kept as evidence {name}" for device, name in evidence.items()]
    lines += [f"  failed: {failure}" for failure in found["failures"]]
    lines += [f"  {state.lower()}: {seconds:.1f} s" for state, seconds in found["seconds"].items()]
    lines += [f"  gate {name}: {reason}" for name, reason in found["figures"].get("gates", {}).items()]
    if found.get("transcript"):
        lines.append(f"transcript of {found['transcript_bytes']} bytes: {found['transcript']}; atoll round verify FILE")
    return lines
