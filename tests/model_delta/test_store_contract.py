"""What every store promises: a folder, this process's memory, and a bucket behind a real S3 server."""

from __future__ import annotations

import http.server
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_delta.digest import digest_of
from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable
from model_delta.object_store import PART_BYTES, ObjectStore
from model_delta.store import InventoriedStore
from model_delta.store_url import open_store
from tests.fakes import s3_server

KINDS = ("folder", "memory", "s3")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    with s3_server.running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own in the server's bucket, with the environment that finds it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return "memory://" if request.param == "memory" else str(tmp_path / "store")


@pytest.fixture
def store(url: str) -> InventoriedStore:
    return open_store(url)


def test_what_is_put_is_got(store: InventoriedStore) -> None:
    store.put("delivery", "d1", b"one")
    store.put("delivery", "d1", b"two")
    digest = digest_of(b"sealed")
    store.put("blob", digest, b"sealed")
    assert (store.get("delivery", "d1"), store.get("blob", digest)) == (b"two", b"sealed")
    assert store.has("blob", digest)
    assert not store.has("blob", "other")
    store.put("delivery", "a.b-c_d", b"")
    assert store.get("delivery", "a.b-c_d") == b""
    assert store.names("delivery") == ("a.b-c_d", "d1")
    assert store.names("nothing-here") == ()
    assert store.entries("nothing-here") == ()
    for use in (lambda: store.get("delivery", "d2"), lambda: store.read("delivery", "d2", 0, 1)):
        with pytest.raises(NotFound, match=r"no delivery (named )?d2"):
            use()
    store.remove("delivery", "d1")
    store.remove("delivery", "d1")
    assert not store.has("delivery", "d1")


def test_a_second_store_at_the_same_place_sees_the_same(url: str, store: InventoriedStore) -> None:
    if url == "memory://":
        pytest.skip("memory belongs to the one that opened it")
    store.put("root", "r", b"manifest")
    assert open_store(url).get("root", "r") == b"manifest"


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4])
def test_ranges(store: InventoriedStore, data: bytes) -> None:
    store.put("blob", "b", data)
    for offset, length in ((0, 0), (0, 1), (0, 5000), (1, 3), (255, 2), (1023, 9), (1024, 1), (1024, 0), (10**12, 5)):
        assert store.read("blob", "b", offset, length) == (len(data), data[offset : offset + length]), (offset, length)
    for offset, length in ((-1, 1), (0, -1)):
        with pytest.raises(Malformed, match="expected a range"):
            store.read("blob", "b", offset, length)


@pytest.mark.parametrize("size", [PART_BYTES, 2 * PART_BYTES + 12_345])
def test_large_objects_travel_in_parts(store: InventoriedStore, size: int) -> None:
    data = os.urandom(1 << 16) * (size // (1 << 16) + 1)
    data = data[:size]
    store.put("blob", "large", data)
    assert store.get("blob", "large") == data
    assert store.read("blob", "large", size - 100, 1000) == (size, data[-100:])
    assert [entry.size for entry in store.entries("blob")] == [size]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0b", "a\n", "é", "x" * 201])
def test_names_that_are_none(store: InventoriedStore, name: str) -> None:
    for use in (
        lambda: store.put("blob", name, b""),
        lambda: store.get("blob", name),
        lambda: store.read("blob", name, 0, 1),
        lambda: store.has("blob", name),
        lambda: store.remove("blob", name),
    ):
        with pytest.raises(Malformed, match="expected a name"):
            use()


@pytest.mark.parametrize("kind", ["", "..", "../blob", ".writing", "Blob", "a/b", "blob\n"])
def test_kinds_that_are_none(store: InventoriedStore, kind: str) -> None:
    for use in (lambda: store.put(kind, "n", b""), lambda: store.names(kind), lambda: store.entries(kind)):
        with pytest.raises(Malformed, match="expected a kind"):
            use()


def test_what_was_written_again_is_not_removed(store: InventoriedStore) -> None:
    store.put("artifact", "old", b"one")
    store.put("artifact", "kept", b"two")
    listed = {entry.name: entry for entry in store.entries("artifact")}
    assert {name: entry.size for name, entry in listed.items()} == {"old": 3, "kept": 3}
    _pass_a_second(store, listed["kept"].modified, lambda: store.put("artifact", "kept", b"two"))
    assert store.remove_unchanged(listed["old"])
    assert not store.remove_unchanged(listed["old"])
    assert not store.remove_unchanged(listed["kept"])
    assert store.names("artifact") == ("kept",)


def _pass_a_second(store: InventoriedStore, before: float, put: Callable[[], None]) -> None:
    """Put until the store's clock, which may count in seconds, shows another time."""
    while True:
        put()
        (entry,) = (entry for entry in store.entries("artifact") if entry.name == "kept")
        if entry.modified != before:
            return


def test_many_writers_of_the_same_and_of_different_names(store: InventoriedStore) -> None:
    """Readers in between see the whole of one writer's bytes, never a mixture."""
    failures: list[BaseException] = []
    versions = {bytes([65 + writer]) * 50_000 for writer in range(4)}
    store.put("manifest", "shared", min(versions))

    def work(data: bytes) -> None:
        try:
            for number in range(6):
                store.put("manifest", "shared", data)
                store.put("blob", f"{data[0]}-{number}", data)
                assert store.get("manifest", "shared") in versions
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(data,)) for data in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store.names("blob")) == 24
    assert all(store.get("blob", name)[:1] == bytes([int(name.split("-")[0])]) for name in store.names("blob"))


_WRITER = """
    import sys
    from model_delta.store_url import open_store

    store = open_store(sys.argv[1])
    old, new = b"old" * 7_000_000, b"new" * 7_000_000
    print("ready", flush=True)
    while True:
        for data in (new, old):
            store.put("manifest", "m", data)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_killed_writers_leave_whole_objects(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """21 MB, three parts: a process that writes them over and over is killed at different moments."""
    url = str(request.getfixturevalue("s3_url")) if kind == "s3" else str(tmp_path / "store")
    store = open_store(url)
    whole = {digest_of(data * 7_000_000) for data in (b"old", b"new")}
    store.put("manifest", "m", b"old" * 7_000_000)
    for wait_s in (0.03, 0.11, 0.19):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_WRITER), url], stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            threading.Event().wait(wait_s)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(10)
            if writer.stdout is not None:
                writer.stdout.close()
        assert digest_of(open_store(url).get("manifest", "m")) in whole
        assert store.names("manifest") == ("m",)


def test_processes_that_write_at_once(s3_url: str) -> None:
    """The same blob and one of its own from each of three processes."""
    script = """
        import sys
        from model_delta.store_url import open_store

        store = open_store(sys.argv[1])
        store.put("blob", "same", b"same" * 1000)
        store.put("blob", sys.argv[2], sys.argv[2].encode())
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), s3_url, f"own-{number}"])
        for number in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    store = open_store(s3_url)
    assert store.names("blob") == ("own-0", "own-1", "own-2", "same")
    assert store.get("blob", "same") == b"same" * 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("ftp://host/path", "expected a folder, file://"),
        ("s3://", "found no bucket"),
        ("s3://key:hush@bucket/models", "found a login"),
        ("s3://bucket/models?secret=hush", "found a login, a query"),
        ("file://host/path", "file:///ABSOLUTE/PATH"),
    ],
)
def test_urls_that_name_no_store(text: str, said: str) -> None:
    with pytest.raises(Malformed, match=said) as refused:
        open_store(text)
    assert "hush" not in str(refused.value)


def test_folders_by_path_and_by_url(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a b")).put("blob", "b", b"here")
    assert open_store(f"{(tmp_path / 'a b').as_uri()}").get("blob", "b") == b"here"


def test_without_the_library_it_says_what_to_install() -> None:
    script = """
        import sys
        sys.modules["obstore"] = None
        from model_delta.errors import Malformed
        from model_delta.store_url import open_store
        try:
            open_store("s3://bucket/models")
        except Malformed as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pip install 'atoll[store]'" in done.stdout


def test_a_wrong_key_is_named_and_not_shown(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    store = open_store(s3_url)
    with pytest.raises(Unavailable, match="expected permission") as refused:
        store.put("blob", "b", b"data")
    assert "hush" not in str(refused.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(refused.value)


@contextmanager
def _answering(status: int, body: bytes) -> Iterator[str]:
    """A server that answers everything with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (507, b"<Code>InsufficientStorage</Code>", StorageFull, "no room for 4 bytes of blob b"),
        (400, b"<Code>QuotaExceeded</Code>", StorageFull, "raise the quota"),
        (503, b"<Code>SlowDown</Code> hush", Unavailable, "HTTP status 503"),
        (403, b"<Code>AccessDenied</Code><AWSAccessKeyId>hush</AWSAccessKeyId>", Unavailable, "expected permission"),
    ],
)
def test_what_servers_refuse(
    status: int, body: bytes, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _answering(status, body) as url:
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "k"),
            ("AWS_SECRET_ACCESS_KEY", "s"),
        ):
            monkeypatch.setenv(name, value)
        store = ObjectStore("s3://bucket/models", retry_s=0.3, request_s=5)
        with pytest.raises(kind, match=said) as refused:
            store.put("blob", "b", b"data")
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("name", ["b", "507", "QuotaExceeded"])  # errors repeat it, as they do the time they took
def test_nobody_there_is_unavailable_after_the_deadline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with pytest.raises(Unavailable, match="check endpoint, bucket and network"):
        ObjectStore("s3://bucket/models", retry_s=0.3, request_s=5).get("blob", name)
