"""A model file made as a stream: cut off at every write, taken up again, never begun again, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import pytest

from benchmarks import device_update
from model_delta.assembly import PATCH_NAME, MemoryRoom, check_file, is_finished, patch_label, pieces_of, write_release
from model_delta.digest import digest_of
from model_delta.errors import AtollError, DigestMismatch, Malformed, NotFound, Unavailable, Untrusted
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.encryption import CHUNK_BYTES, open_stream, seal_blob
from model_delta.manifest import Blob, Delivery, DenseOffer, Manifest, PatchOffer, Segment
from model_delta.patch.access import BytesAccess, Part, PathAccess, RandomAccess, pieces_from
from model_delta.patch.container import make
from model_delta.patch.route import DeviceLimits, Route, Step, plan_update
from model_delta.release import Release, build_release, with_offers
from tests.model_delta.models import NOW, keyring
from tests.systems import on_linux

KEY = b"K" * 32


class PowerCut(Exception):
    """The power goes off here."""


class FragileRoom(MemoryRoom):
    """A room whose power goes off at the `deadly`-th write, of which only the first half arrives; it counts the bytes
    that were written to each file."""

    def __init__(self) -> None:
        super().__init__()
        self.deadly = -1
        self.written: dict[str, int] = {}

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with super().open(name) as file:
            yield cast(BinaryIO, _Fragile(file, name, self))

    def put(self, name: str, data: bytes) -> None:
        """Let `data` stand there by that name."""
        self._files[name] = BytesIO(data)


class _Fragile:
    def __init__(self, file: BinaryIO, name: str, room: FragileRoom) -> None:
        self._file, self._name, self._room = file, name, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes | memoryview) -> int:
        self._room.deadly -= 1
        if self._room.deadly == 0:
            data = data[: len(data) // 2]
        self._room.written[self._name] = self._room.written.get(self._name, 0) + len(data)
        self._file.write(data)
        if self._room.deadly == 0:
            raise PowerCut
        return len(data)


class Versions:
    """Three versions of 0.3 MB that are no models (segments of 64 KiB), each with patches from the one before."""

    def __init__(self, folder: Path) -> None:
        ring = keyring(folder)
        noise = b"".join(bytes.fromhex(digest_of(b"%d" % number)) for number in range(8_000))
        self.files = [noise, noise[:150_000] + b"second" * 5_000 + noise[150_000:], b"third" * 3_000 + noise]
        self.releases: list[Release] = []
        for number, file in enumerate(self.files):
            made = build_release(
                file,
                tenant="acme",
                model="parts",
                version={"eu-west": number + 1},
                release=number + 1,
                parents=[],
                keyring=ring,
                key=KEY,
                now=NOW,
                inputs=(),
                outputs=(),
            )
            for form in ("bsdiff40", "tp1")[:number]:  # by hand: for such files tp1 is not worth offering
                base = self.releases[-1].digest
                patch = make(form, self.files[number - 1], file)
                sealed = seal_blob(KEY, made.digest, patch_label(base, form), patch)
                blob = Blob(digest_of(sealed), len(sealed))
                plain = Delivery(made.digest, (), (PatchOffer(base, blob),))
                dense = Delivery(made.digest, (), (), (DenseOffer(base, blob, form),))
                delivery = with_offers(made.delivery, plain if form == "bsdiff40" else dense)
                made = msgspec.structs.replace(made, delivery=delivery, blobs={**made.blobs, blob.digest: sealed})
            self.releases.append(made)
        self.keys = {release.digest: KEY for release in self.releases}
        self.manifests = {release.digest: release.manifest for release in self.releases}
        self.blobs: dict[str, RandomAccess] = {
            digest: BytesAccess(data) for release in self.releases for digest, data in release.blobs.items()
        }

    @property
    def want(self) -> Manifest:
        return self.releases[2].manifest

    def route(self, kind: str, form: str = "tp1") -> tuple[Route, dict[str, RandomAccess], dict[str, RandomAccess]]:
        """A route of that kind to the third version, the files at hand for it, and the segments."""
        deliveries = {release.digest: release.delivery for release in self.releases}
        limits = DeviceLimits(formats=frozenset({form}))
        first, second, last = (release.digest for release in self.releases)
        if kind == "chain":
            steps = tuple(
                plan_update({base: 1}, self.manifests[target], deliveries, limits=limits).steps[0]
                for base, target in ((first, second), (second, last))
            )
            return Route(steps, 0, "chain"), {first: BytesAccess(self.files[0])}, {}
        if kind == "patch":
            route = plan_update({second: 1}, self.want, deliveries, limits=limits)
            return route, {second: BytesAccess(self.files[1])}, {}
        if kind == "replace":
            damaged = bytearray(self.files[2])
            damaged[70_000] ^= 1
            damaged[-1] ^= 1
            pieces = pieces_of(self.want, bytes(damaged))
            return plan_update({}, self.want, {last: deliveries[last]}, pieces=pieces), {}, pieces
        return plan_update({}, self.want, {last: deliveries[last]}), {}, {}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return Versions(tmp_path_factory.mktemp("versions"))


KINDS = [("patch", "bsdiff40"), ("patch", "tp1"), ("chain", "bsdiff40"), ("whole", "tp1"), ("replace", "tp1")]


@pytest.mark.parametrize(("kind", "form"), KINDS)
def test_a_power_cut_at_every_write_costs_that_write(versions: Versions, kind: str, form: str) -> None:
    """Dead at the first write, at the second, ... of one and the same room: what was whole is not written again, and
    the file is the right one."""
    route, held, pieces = versions.route(kind, form)
    assert route.kind == kind
    room, deaths, last = FragileRoom(), 0, 0
    while True:
        room.deadly = 2 if room.read(PATCH_NAME) is None else 4
        try:
            made = write_release(
                versions.want, route, versions.blobs, versions.keys, room,
                held=held, manifests=versions.manifests, pieces=pieces,
            )  # fmt: skip
            break
        except PowerCut:
            deaths += 1
        done = sum(room.written.values())
        assert done > last, "each life gets further"
        last = done
        assert deaths < 60
    assert deaths > 1
    assert made.pread(0, made.size) == versions.files[2]
    for name, size in room.written.items():
        if name in versions.manifests:  # a torn write costs its own bytes and what its segment had before
            assert size <= versions.manifests[name].size + deaths * (CHUNK_BYTES + 65_536), name
    assert room.read(PATCH_NAME) is None


@pytest.mark.parametrize(("kind", "form"), KINDS)
@pytest.mark.parametrize("tail", [b"", bytes(40_000), b"x"])
def test_only_whole_segments_of_what_stands_there_count(versions: Versions, kind: str, form: str, tail: bytes) -> None:
    """A power cut may leave zeros, or less than was written; a stranger's file has no whole segment."""
    route, held, pieces = versions.route(kind, form)
    goal = versions.releases[2].digest
    for stands in (versions.files[2][:200_000] + tail, versions.files[2] + tail, bytes(700_000), b""):
        room = FragileRoom()
        room.put(goal, stands)
        made = write_release(
            versions.want, route, versions.blobs, versions.keys, room,
            held=held, manifests=versions.manifests, pieces=pieces,
        )  # fmt: skip
        assert made.pread(0, made.size + 1) == versions.files[2]
        here = 0
        if stands.startswith(versions.files[2][:200_000]):
            here = len(stands) if stands == versions.files[2] else 3 * 65_536
        assert room.written.get(goal, 0) <= len(versions.files[2]) - here


def test_a_finished_file_needs_nothing_any_more(versions: Versions) -> None:
    route, _, _ = versions.route("chain", "bsdiff40")
    room = FragileRoom()
    room.put(versions.releases[2].digest, versions.files[2])
    made = write_release(versions.want, route, {}, {}, room, manifests=versions.manifests)
    assert made.size == len(versions.files[2])
    assert not room.written


def test_a_finished_step_of_a_chain_is_not_taken_again(versions: Versions) -> None:
    route, _, _ = versions.route("chain", "bsdiff40")
    middle, last = route.steps[0].target, route.steps[1]
    room = FragileRoom()
    room.put(middle, versions.files[1])
    blobs = {blob.digest: versions.blobs[blob.digest] for blob in last.blobs}
    write_release(versions.want, route, blobs, versions.keys, room, manifests=versions.manifests)
    assert middle not in room.written
    assert room.read(middle) is None, "a version that was passed through has had its use"


def test_what_an_attempt_left_serves_another_way_too(versions: Versions) -> None:
    """A chain's patch that is spoilt, then the whole: segments that are there are not opened again."""
    route, held, _ = versions.route("patch", "bsdiff40")
    blob = route.steps[0].blobs[0].digest
    room = FragileRoom()
    room.deadly = 6
    with pytest.raises(PowerCut):
        write_release(versions.want, route, versions.blobs, versions.keys, room, held=held)
    stands = room.read(versions.releases[2].digest)
    assert stands is not None
    whole_segments = stands.size // 65_536
    assert whole_segments > 0
    data = bytearray(versions.releases[2].blobs[blob])
    data[-1] ^= 1
    with pytest.raises(DigestMismatch):
        write_release(
            versions.want, route, {**versions.blobs, blob: BytesAccess(bytes(data))}, versions.keys, room, held=held
        )
    whole, _, _ = versions.route("whole")
    left_out = {blob.digest: BytesAccess(b"not looked at") for blob in whole.steps[0].blobs[:whole_segments]}
    made = write_release(versions.want, whole, {**versions.blobs, **left_out}, versions.keys, room)
    assert is_finished(versions.want, made)


def test_work_that_is_interrupted_stops_at_the_next_write(versions: Versions) -> None:
    route, held, _ = versions.route("patch")
    room, asked = FragileRoom(), iter([False, False, True])
    with pytest.raises(Unavailable, match="interrupted after"):
        write_release(
            versions.want, route, versions.blobs, versions.keys, room, held=held, interrupted=lambda: next(asked)
        )
    stands = room.read(versions.releases[2].digest)
    assert stands is not None
    assert 0 < stands.size < len(versions.files[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 11},
        {"merkle_root": digest_of(b"other")},
        {"segments": (Segment("part-0000", 9, digest_of(b"012345678")),)},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_before_a_byte_is_written(
    versions: Versions, changes: dict[str, Any]
) -> None:
    want = msgspec.structs.replace(versions.want, **changes)
    route = Route((Step("whole", "", "", ()),), 0, "whole")
    room = FragileRoom()
    with pytest.raises(AtollError):
        write_release(want, route, versions.blobs, versions.keys, room)
    assert not room.written
    with pytest.raises(DigestMismatch):
        check_file(want, versions.files[2])


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda step: {"blobs": step.blobs[:-1]}, Malformed, "segments, found"),
        (lambda step: {"blobs": (*step.blobs, step.blobs[0])}, Malformed, "segments, found"),
        (lambda step: {"kind": "replace", "segments": (99,), "blobs": step.blobs[:1]}, Malformed, "segments, found"),
        (lambda step: {"kind": "replace", "segments": (0,), "blobs": step.blobs[:1]}, NotFound, "not at hand"),
        (lambda step: {"blobs": (step.blobs[1], step.blobs[0], *step.blobs[2:])}, AtollError, "does not open"),
    ],
    ids=["one too few", "one too many", "a number beyond", "parts without the rest", "another order"],
)
def test_a_step_that_does_not_make_its_version_is_refused(
    versions: Versions, change: Callable[[Step], dict[str, Any]], kind: type[AtollError], words: str
) -> None:
    (step,) = versions.route("whole")[0].steps
    route = Route((msgspec.structs.replace(step, **change(step)),), 0, "whole")
    with pytest.raises(kind, match=words):
        write_release(versions.want, route, versions.blobs, versions.keys, FragileRoom())


# Sealed blobs as streams


@pytest.mark.parametrize("plaintext", [b"a" * 5_000_000, bytes(range(256)) * 40, b""])
def test_pieces_are_small_whatever_they_unpack_to(plaintext: bytes) -> None:
    sealed = BytesAccess(seal_blob(KEY, "1" * 64, "label", plaintext))
    pieces = list(open_stream(KEY, "1" * 64, "label", sealed, len(plaintext)))
    assert b"".join(pieces) == plaintext
    assert max(map(len, pieces), default=0) <= CHUNK_BYTES


def test_a_piece_comes_only_from_chunks_that_opened() -> None:
    plaintext = b"".join(bytes.fromhex(digest_of(b"%d" % number)) for number in range(8_000))
    sealed = bytearray(seal_blob(KEY, "1" * 64, "label", plaintext))
    sealed[-1] ^= 1
    pieces = open_stream(KEY, "1" * 64, "label", BytesAccess(bytes(sealed)), len(plaintext))
    assert b"".join(islice(pieces, 3)) == plaintext[: 3 * CHUNK_BYTES]
    with pytest.raises(Untrusted, match="chunk 3 does not open"):
        next(pieces)


def test_files_by_path_are_read_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    whole = PathAccess(path)
    assert (whole.size, whole.pread(3, 4), whole.pread(8, 9)) == (10, b"3456", b"89")
    part = Part(whole, 2, 5)
    assert (part.size, part.pread(0, 99), part.pread(4, 9), part.pread(7, 9)) == (5, b"23456", b"6", b"")
    assert (Part(whole, 8, 5).size, Part(whole, 50, 5).size) == (2, 0)
    assert b"".join(pieces_from(part)) == b"23456"
    path.unlink()
    with pytest.raises(NotFound, match="it is gone"):
        whole.pread(0, 1)
    with pytest.raises(NotFound, match="it is gone"):
        assert whole.size


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two devices before an update, with int8 models of 2 MB and of 8 MB."""
    folders = []
    for width in (1_400, 2_800):
        rng = np.random.default_rng(width)
        sizes = (4, width, width, 1)
        old = [
            (rng.standard_normal(pair, np.float32) / np.float32(16), np.zeros(pair[1], np.float32))
            for pair in pairwise(sizes)
        ]
        new = [(w + np.float32(1e-4) * rng.standard_normal(w.shape, np.float32), b) for w, b in old]
        before = quantize_weights(mlp(old))
        folders.append(tmp_path_factory.mktemp("device") / f"{width}")
        device_update.prepare(folders[-1], before, quantize_weights(mlp(new), before))
    return folders


def mlp(weights: list[Any]) -> bytes:
    return mlp_model(weights, np.zeros(4, np.float32), np.ones(4, np.float32))


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_memory_does_not_grow_with_the_model(devices: list[Path], kind: str) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks import device_update\n"
        "if len(sys.argv) > 1: device_update.apply(*sys.argv[1:])\n"
        "status = Path('/proc/self/status').read_text().split('VmHWM:')[1]\n"
        "print(int(status.split()[0]) / 1000)\n"
    )

    def peak_mb(*arguments: str) -> float:
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    baseline = peak_mb()
    small, large = (peak_mb(str(folder), kind) - baseline for folder in devices)
    assert max(small, large) < 4, (small, large)
    assert large - small < 1.5, (small, large)
