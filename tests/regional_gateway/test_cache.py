"""A gateway's copies stay within their bound, and what the region answers with stays."""

from __future__ import annotations

import threading
from pathlib import Path

from model_delta.encoding import pack
from model_delta.manifest import Blob, Delivery
from model_delta.store import ArtifactStore, DirectoryStore
from monitoring.metrics import Metrics
from regional_gateway.cache import BoundedStore


def bounded(path: Path, bytes_max: int, *in_force: str, metrics: Metrics | None = None) -> BoundedStore:
    return BoundedStore(
        DirectoryStore(path), bytes_max=bytes_max, in_force=lambda: in_force, metrics=metrics or Metrics()
    )


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    metrics = Metrics()
    store: ArtifactStore = bounded(tmp_path, 300, metrics=metrics)
    for name in ("a", "b", "c"):
        store.put("blob", name, bytes(100))
    assert store.read("blob", "a", 0, 1) == (100, b"\0")
    store.put("blob", "d", bytes(100))
    assert store.names("blob") == ("a", "c", "d")
    store.put("blob", "c", bytes(150))
    assert store.names("blob") == ("c", "d")
    store.remove("blob", "c")
    store.put("blob", "e", bytes(200))
    assert store.names("blob") == ("d", "e")
    assert store.get("blob", "d") == bytes(100)
    assert metrics.value("atoll_cache_bytes") == 300
    assert metrics.value("atoll_cache_dropped_bytes_total", kind="blob") == 200


def test_what_the_region_keeps_for_itself_stays(tmp_path: Path) -> None:
    store = bounded(tmp_path, 100)
    for kind, name in (("plan", "p"), ("key", "k"), ("tuf", "1.root.json"), ("tuf", "timestamp.json")):
        store.put(kind, name, bytes(200))
    store.put("tuf", "7.snapshot.json", bytes(80))
    store.put("artifact", "graph", bytes(80))
    assert store.names("tuf") == ("1.root.json", "timestamp.json")
    assert (store.names("plan"), store.names("key"), store.names("artifact")) == (("p",), ("k",), ("graph",))


def test_versions_in_force_stay_beyond_the_bound_and_others_go(tmp_path: Path) -> None:
    version, old = "1" * 64, "2" * 64
    segments = ("3" * 64, "4" * 64)
    store = bounded(tmp_path, 500, version)
    for digest, blobs in ((version, segments), (old, ("5" * 64,))):
        store.put("manifest", digest, bytes(50))
        store.put("delivery", digest, pack(Delivery(digest, tuple(Blob(blob, 200) for blob in blobs))))
        for blob in blobs:
            store.put("blob", blob, bytes(200))
    store.put("blob", "6" * 64, bytes(400))
    assert set(store.names("blob")) == {*segments, "6" * 64}
    assert store.names("manifest") == store.names("delivery") == (version,)


def test_a_restart_counts_what_is_there_and_a_smaller_bound_holds_at_once(tmp_path: Path) -> None:
    before = bounded(tmp_path, 1_000)
    for number in range(5):
        before.put("blob", f"b{number}", bytes(100))
    assert len(bounded(tmp_path, 1_000).names("blob")) == 5
    assert len(bounded(tmp_path, 250).names("blob")) == 2


def test_an_object_larger_than_the_bound_is_served_and_then_goes(tmp_path: Path) -> None:
    store = bounded(tmp_path, 100)
    store.put("blob", "large", bytes(400))
    assert store.get("blob", "large") == bytes(400)
    store.put("blob", "small", bytes(10))
    assert store.names("blob") == ("small",)


def test_many_threads_keep_the_count_right(tmp_path: Path) -> None:
    metrics = Metrics()
    store = bounded(tmp_path, 2_000, metrics=metrics)

    def work(number: int) -> None:
        for step in range(20):
            store.put("blob", f"{number}-{step % 7}", bytes(100 + step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = sum(len(store.get("blob", name)) for name in store.names("blob"))
    assert metrics.value("atoll_cache_bytes") == held <= 2_000
