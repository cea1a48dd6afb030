"""A device's update from file to file, whose memory `benchmarks.deltas` measures, in a process of its own
(`benchmarks.cost`)."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.slots import Slots
from model_delta.assembly import pieces_of, write_release
from model_delta.encoding import pack, unpack
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import Delivery, parse_manifest
from model_delta.patch.route import plan_update
from model_delta.release import Release, build_release
from model_delta.trust.signing import open_envelope


def nothing() -> int:
    """The interpreter with the imports of this module: the baseline of memory."""
    return 0


def prepare(folder: Path, old: bytes, new: bytes) -> None:
    """A device that runs `old` and has fetched everything that an update to `new` takes, by patch or as a whole."""
    folder.mkdir(parents=True)
    ring = EmbeddedKeyring.create(folder / "keys", "acme", clock=lambda: 0.0)
    releases: list[Release] = []
    for number, file in enumerate((old, new)):
        made = build_release(
            file,
            tenant="acme",
            model="model",
            version={"eu-west": number + 1},
            release=number + 1,
            parents=[(releases[0].manifest, old)] if releases else [],
            keyring=ring,
            key=bytes(32),
            now=0.0,
            inputs=(),
            outputs=(),
        )
        releases.append(made)
    before, after = releases
    slots = Slots(folder / "state")
    slots.write_slot("a", before.envelope, old)
    slots.point_to("a")
    for digest, sealed in after.blobs.items():
        slots.append(digest, 0, sealed)
        slots.complete(digest)
    (folder / "manifest").write_bytes(after.envelope)
    (folder / "delivery").write_bytes(pack(after.delivery))


def apply(folder: str, kind: str) -> int:
    """An update of `prepare`, as `edge_runtime.acquisition` does it once all blobs are there: look at what is
    held, plan, make the file, install it, check it as before it is opened. Returns the file's size."""
    place = Path(folder)
    slots = Slots(place / "state")
    envelope, delivery = (place / "manifest").read_bytes(), unpack((place / "delivery").read_bytes(), Delivery)
    manifest = parse_manifest(open_envelope(envelope).payload)
    held = {}
    version = slots.installed("a")
    if version is not None and kind == "patch":
        pieces_of(version.manifest, slots.read(version))
        held[version.digest] = slots.read(version)
    sizes = {digest: file.size for digest, file in held.items()}
    route = plan_update(sizes, manifest, {delivery.manifest: delivery})
    if route.kind != kind:
        raise SystemExit(f"expected a route by {kind}, found {route.kind}")
    blobs = {blob.digest: slots.complete(blob.digest) for step in route.steps for blob in step.blobs}
    write_release(manifest, route, blobs, {delivery.manifest: bytes(32)}, slots.room("b"), held=held)
    slots.install("b", envelope)
    made = slots.installed("b")
    if made is None:
        raise SystemExit("the version that was installed is not there")
    return slots.model_file(made).stat().st_size
