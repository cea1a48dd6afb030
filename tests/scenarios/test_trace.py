"""The reader of traces finds what it is there to find."""

from pathlib import Path

from tests.scenarios import trace

TEXT = """\
10 connect(5, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("93.184.216.34")}, 16) = -1 EINPROGRESS (x)
10 connect(5, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("127.0.0.1")}, 16 <unfinished ...>
11 openat(AT_FDCWD, "/home/me/.flwr/config", O_WRONLY|O_CREAT|O_CLOEXEC, 0666 <unfinished ...>
10 <... connect resumed>) = 0
11 <... openat resumed>) = 7
11 openat(AT_FDCWD, "/etc/hosts", O_RDONLY|O_CLOEXEC) = 7
11 openat(AT_FDCWD, "/root/denied", O_RDWR|O_CREAT, 0666) = -1 EACCES (Permission denied)
12 rename("/tmp/a", "/tmp/b") = 0
12 sendto(3, "x", 1, MSG_NOSIGNAL, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("10.0.0.2")}, 16) = 1
12 sendto(3, "inet_addr", 9, MSG_NOSIGNAL, NULL, 0) = 9
13 connect(3, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT (No such file or directory)
14 connect(3, {sa_family=AF_INET6, sin6_port=htons(443), inet_pton(AF_INET6, "2606:4700::1", &a)}, 28 <unfinished ...>
"""


def test_connections_beyond_this_machine_are_found_even_when_they_failed_or_never_returned(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(TEXT)
    found = [trace.reached(call) for call in trace.calls(tmp_path / "trace")]
    assert [one for one in found if one] == ["93.184.216.34", "10.0.0.2", "2606:4700::1"]


def test_files_made_or_opened_for_writing_are_found(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(TEXT)
    found = [trace.written(call) for call in trace.calls(tmp_path / "trace")]
    assert [one for one in found if one] == ["/home/me/.flwr/config", "/tmp/b"]
