"""Files by name from a store, a folder, a callable and HTTP, and the ways a mirror can try to hold a device up."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_delta.errors import AtollError, Malformed, NotFound, TooLarge, TooSlow, Unavailable
from model_delta.trust.fetchers import (
    AskSource,
    FolderSource,
    HttpSource,
    Patience,
    Source,
    StoreSource,
    paced,
)
from tests.fakes.http_mirror import HttpMirror, served
from tests.fakes.tuf_site import MemoryStore, Mirror, Site

DATA = bytes(range(256)) * 300


def from_store(folder: Path) -> Source:
    store = MemoryStore()
    store.put("tuf", "a.json", DATA)
    store.put("tuf", "none.json", b"")
    return StoreSource(store, "tuf")


def from_folder(folder: Path) -> Source:
    (folder / "in").mkdir()
    (folder / "in" / "a.json").write_bytes(DATA)
    (folder / "in" / "none.json").write_bytes(b"")
    (folder / "secret.json").write_bytes(b"outside")
    return FolderSource(folder / "in")


def from_answers(folder: Path) -> Source:
    store = MemoryStore()
    store.put("tuf", "a.json", DATA)
    store.put("tuf", "none.json", b"")
    return AskSource(lambda name, at, length, timeout_s: store.read("tuf", name, at, min(length, 1000)))


@pytest.mark.parametrize("make", [from_store, from_folder, from_answers])
def test_every_source_gives_the_same_bytes(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    source = make(tmp_path)
    assert b"".join(source.open("a.json", 5.0)) == DATA
    assert b"".join(source.open("none.json", 5.0)) == b""
    for name in ("other.json", "../secret.json", "..", "a.json/b", "é\0"):
        with pytest.raises((NotFound, ValueError)):
            list(source.open(name, 5.0))


@pytest.mark.parametrize("answer", [(-1, b""), (5, b""), (5, b"123456"), (0, b"x")])
def test_an_answer_that_is_not_the_range_asked_for_is_refused(answer: tuple[int, bytes]) -> None:
    with pytest.raises(Malformed, match="expected bytes from 0 of"):
        list(AskSource(lambda *asked: answer).open("a.json", 5.0))


def test_asking_ends_at_its_deadline() -> None:
    clock = 0.0

    def slow(name: str, at: int, length: int, timeout_s: float) -> tuple[int, bytes]:
        nonlocal clock
        clock += 2.0
        return 1_000_000, b"x"

    with pytest.raises(TooSlow, match=r"expected within 5 s, found 3 bytes"):
        list(AskSource(slow, monotonic=lambda: clock).open("a.json", 5.0))


@pytest.mark.parametrize(("fault", "error"), [(TimeoutError(), TooSlow), (ConnectionResetError(), Unavailable)])
def test_a_fault_of_the_line_is_not_taken_for_one_of_the_disk(fault: OSError, error: type[AtollError]) -> None:
    def broken(name: str, at: int, length: int, timeout_s: float) -> tuple[int, bytes]:
        raise fault

    with pytest.raises(error):
        list(AskSource(broken).open("a.json", 5.0))


def test_bytes_beyond_the_limit_are_not_taken() -> None:
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield bytes(100)

    with pytest.raises(TooLarge, match="expected at most 1000 bytes"):
        list(paced(endless(), "a", 1000, Patience(), lambda: 0.0, 0.0))
    assert len(taken) == 11


def test_a_file_that_comes_steadily_but_slowly_enough_is_taken() -> None:
    clock = 0.0

    def steady() -> Iterator[bytes]:
        nonlocal clock
        for _ in range(20):
            clock += 1.0
            yield bytes(300)

    assert len(b"".join(paced(steady(), "a", 10_000, Patience(), lambda: clock, 0.0))) == 6000


# -- HTTP


@pytest.fixture
def http() -> Iterator[HttpMirror]:
    with served(Mirror(Site())) as mirror:
        yield mirror


def fetched(http: HttpMirror, name: str, timeout_s: float = 60.0) -> bytes:
    return b"".join(HttpSource(http.url + "metadata/").open(name, timeout_s))


def test_http_gives_what_is_there_and_says_what_is_not(http: HttpMirror) -> None:
    assert fetched(http, "timestamp.json") == http.mirror.site.store.get("tuf", "timestamp.json")
    with pytest.raises(NotFound, match="404"):
        fetched(http, "2.root.json")


def test_http_names_are_quoted_once(http: HttpMirror) -> None:
    for name in ("1.%2Fdelegated.json", "targets/a b?c#d.txt"):
        with pytest.raises(NotFound):
            fetched(http, name)
    assert http.asked == ["/metadata/1.%2Fdelegated.json", "/metadata/targets/a%20b%3Fc%23d.txt"]


def raw(*parts: bytes, every_s: float = 0.0, sent: list[int] | None = None) -> Callable[[socket.socket], None]:
    def answer(line: socket.socket) -> None:
        try:
            for part in parts:
                line.sendall(part)
                if sent is not None:
                    sent.append(len(part))
                time.sleep(every_s)
        except OSError:
            pass  # the client had enough

    return answer


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (raw(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"), Unavailable, "expected status 200, found 500"),
        (raw(b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\n\r\n"), Unavailable, "expected status 200, found 302"),
        (raw(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"), NotFound, "403"),
        (raw(HEAD, b"Content-Length: 100\r\n\r\nabc"), Unavailable, "IncompleteRead|broke"),
        (raw(b"what is this"), Unavailable, "BadStatusLine"),
        (raw(HEAD, b"A: " + b"x" * 70_000 + b"\r\n\r\n"), Unavailable, "LineTooLong"),
        (raw(HEAD, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), Unavailable, "IncompleteRead"),
        (raw(b""), Unavailable, "RemoteDisconnected"),
    ],
)
def test_http_answers_that_are_none(
    http: HttpMirror, answer: Callable[[socket.socket], None], error: type[AtollError], words: str
) -> None:
    http.bent["/metadata/timestamp.json"] = answer
    with pytest.raises(error, match=words):
        fetched(http, "timestamp.json")


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD, *[b"X: y\r\n"] * 600],
        [HEAD, b"Content-Length: 100000\r\n\r\n", *[b"x"] * 600],
        [b"HTTP/1.0 200 OK\r\n\r\n", *[b"x"] * 600],
        [bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + b"x" * 40],
    ],
    ids=["headers", "body", "until the line ends", "everything"],
)
def test_a_server_that_trickles_is_left_after_the_deadline(http: HttpMirror, parts: list[bytes]) -> None:
    """Each byte comes well within a socket's timeout; without an end to the whole this lasts as long as it likes."""
    sent: list[int] = []
    http.bent["/metadata/timestamp.json"] = raw(*parts, every_s=0.02, sent=sent)
    with pytest.raises(TooSlow, match=r"expected within 0\.3 s"):
        fetched(http, "timestamp.json", 0.3)
    assert len(sent) < len(parts), "it did not wait for the end"


def test_nobody_listens(http: HttpMirror) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="ConnectionRefused"):
            list(HttpSource(f"http://127.0.0.1:{taken.getsockname()[1]}/").open("timestamp.json", 1.0))


@pytest.mark.parametrize("address", ["", "ftp://host/", "http://", "/metadata"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(Malformed, match="mirror: expected http"):
        HttpSource(address)
