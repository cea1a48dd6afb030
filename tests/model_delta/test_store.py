"""The directory store: what it keeps through a crash, a full disk and a hostile name."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.digest import digest_of
from model_delta.errors import Malformed, NotFound, Unavailable
from model_delta.store import ArtifactStore, DirectoryStore


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_put_is_got(tmp_path: Path) -> None:
    store: ArtifactStore = DirectoryStore(tmp_path / "a" / "store")
    store.put("delivery", "d1", b"one")
    store.put("delivery", "d1", b"two")
    digest = digest_of(b"sealed")
    store.put("blob", digest, b"sealed")
    assert (store.get("delivery", "d1"), store.get("blob", digest)) == (b"two", b"sealed")
    assert store.has("blob", digest)
    assert not store.has("blob", "other")
    assert store.names("delivery") == ("d1",)
    assert store.names("nothing-here") == ()
    with pytest.raises(NotFound, match="no delivery named d2"):
        store.get("delivery", "d2")
    with pytest.raises(NotFound):
        store.read("delivery", "d2", 0, 1)
    again = DirectoryStore(tmp_path / "a" / "store")
    assert again.get("delivery", "d1") == b"two"


@given(st.binary(max_size=200), st.integers(0, 250), st.integers(0, 250))
def test_ranges(tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, length: int) -> None:
    store = DirectoryStore(tmp_path_factory.getbasetemp() / "ranges")
    store.put("blob", "b", data)
    assert store.read("blob", "b", offset, length) == (len(data), data[offset : offset + length])


def test_a_range_must_be_one(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("blob", "b", b"data")
    for offset, length in ((-1, 1), (0, -1)):
        with pytest.raises(Malformed):
            store.read("blob", "b", offset, length)
    assert store.read("blob", "b", 10**18, 10**18) == (4, b"")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\n", "é", "x" * 201]
)
def test_path_tricks_in_names_are_refused(tmp_path: Path, name: str) -> None:
    store = DirectoryStore(tmp_path / "store")
    for use in (
        lambda: store.put("blob", name, b""),
        lambda: store.get("blob", name),
        lambda: store.read("blob", name, 0, 1),
        lambda: store.has("blob", name),
    ):
        with pytest.raises(Malformed, match="expected a name"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("kind", ["", "..", "../blob", ".writing", "Blob", "a/b", "blob\n"])
def test_path_tricks_in_kinds_are_refused(tmp_path: Path, kind: str) -> None:
    store = DirectoryStore(tmp_path)
    for use in (lambda: store.put(kind, "n", b""), lambda: store.get(kind, "n"), lambda: store.names(kind)):
        with pytest.raises(Malformed, match="expected a kind"):
            use()


def test_a_damaged_blob_is_healed_by_the_next_put(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("blob", "b", b"sealed bytes")
    (tmp_path / "blob" / "b").write_bytes(b"sealed")
    store.put("blob", "b", b"sealed bytes")
    assert store.get("blob", "b") == b"sealed bytes"


def test_leftovers_are_swept_and_a_write_in_progress_is_not(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    leftover, busy = tmp_path / ".writing" / "1-dead", tmp_path / ".writing" / "1-alive"
    leftover.write_bytes(b"half")
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        DirectoryStore(tmp_path)
        assert not leftover.exists()
        assert busy.exists()
    DirectoryStore(tmp_path)
    assert not busy.exists()
    assert store.names("blob") == ()


def test_killed_at_any_line_the_store_holds_the_old_object_or_the_new_one(tmp_path: Path) -> None:
    """A child overwrites an object and kills itself (SIGKILL) before line 1, 2, 3, ... that it runs in the store."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from model_delta import store as module
        from model_delta.store import DirectoryStore

        path = Path(sys.argv[1])
        old, new = b"old" * 1000, b"new" * 1000
        seen = set()
        for line in range(1, 500):
            DirectoryStore(path).put("manifest", "m", old)
            child = os.fork()
            if child == 0:
                left = line
                def trace(frame, event, argument):
                    global left
                    if frame.f_code.co_filename != module.__file__:
                        return None
                    if event == "line":
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return trace
                sys.settrace(trace)
                DirectoryStore(path).put("manifest", "m", new)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            store = DirectoryStore(path)
            found = store.get("manifest", "m")
            assert found in (old, new), found
            assert store.names("manifest") == ("m",), store.names("manifest")
            assert not list((path / ".writing").iterdir())
            seen.add(found)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0 and found == new
                break
        else:
            raise SystemExit("never finished")
        assert seen == {old, new}
        print(line)
    """
    assert int(run(script, str(tmp_path / "store"))) > 15


def test_a_full_disk_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's own refusal, by a limit on file size in a child."""
    script = """
        import resource, sys
        from pathlib import Path
        from model_delta.errors import StorageFull
        from model_delta.store import DirectoryStore

        store = DirectoryStore(Path(sys.argv[1]))
        store.put("blob", "b", b"small")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.put("blob", "b", bytes(1_000_000))
        except StorageFull as error:
            print(error)
        assert store.get("blob", "b") == b"small"
    """
    said = run(script, str(tmp_path))
    assert "no room for 1000000 bytes of blob b" in said
    assert list((tmp_path / ".writing").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    (tmp_path / "blob").write_bytes(b"a file where the folder should be")
    with pytest.raises(Unavailable, match="blob b"):
        store.put("blob", "b", b"")


def test_many_writers_and_openers_at_once(tmp_path: Path) -> None:
    """Sweeps race with writes; every write must still arrive."""
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            for number in range(15):
                DirectoryStore(tmp_path).put("blob", f"{writer}-{number}", b"%d" % number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(DirectoryStore(tmp_path).names("blob")) == 60
    assert os.listdir(tmp_path / ".writing") == []  # noqa: PTH208
